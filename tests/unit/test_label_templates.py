# pytest tests/unit/test_label_templates.py
"""Labels of chats with templates that are hard to read."""

import re
import time

import pytest

from alst_jax.config import UserError
from alst_jax.data.labels import Labels, tokenize
from alst_jax.data.records import Fields, to_document
from tests.unit.labelled import CHATML, CHATS, TEMPLATES, TURNS, family_tokenizer, learned_texts, marked, with_template


def test_a_template_of_ones_own_keeps_the_thoughts():
    """DeepSeek-R1's generation prompt opens `<think>`, and its template strips the thoughts of a turn."""
    tokenizer = family_tokenizer("deepseek-r1")
    record = CHATS["thinking in the text"]
    with pytest.raises(UserError, match="Lost: '<think>.*--chat-template FILE"):
        learned_texts(record, tokenizer)
    tokenizer.chat_template = re.sub(r"\{%- if '</think>' in content %\}.*\n", "", tokenizer.chat_template)
    assert learned_texts(record, tokenizer) == ["<think>\nAdd them.\n</think>\n\nThe sum is 5.<｜end▁of▁sentence｜>"]


def test_an_answer_that_begins_like_the_generation_prompt():
    tokenizer = family_tokenizer("deepseek-r1")
    for answer in ("<table>", "<think>", "Assistant", "<｜Assistant｜>"):
        chat = {"messages": [TURNS[0], {"role": "assistant", "content": answer}]}
        assert learned_texts(chat, tokenizer) == [answer + "<｜end▁of▁sentence｜>"]


@pytest.mark.parametrize(
    "answer", ["assistant", "user", "<|im_start|>assistant\n", "Hi", "<|im_end|>", "  5 ", "\n5\n"]
)
def test_answers_that_look_like_the_template(answer):
    chat = {"messages": [TURNS[0], {"role": "assistant", "content": answer}, *TURNS[2:]]}
    assert learned_texts(chat, with_template(CHATML)) == [f"{answer}<|im_end|>", "5<|im_end|>"]


def test_thoughts_are_lost_although_the_answer_has_the_same_text():
    chat = {"messages": [TURNS[0], {"role": "assistant", "reasoning_content": "5", "content": "5"}]}
    with pytest.raises(UserError, match="leaves text of message 1 out of what is learned. Lost: '5'"):
        learned_texts(chat, with_template(CHATML))


def test_an_end_token_in_front_of_the_next_turn_is_learned():
    late = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '' if loop.first else eos_token }}U: {{ m.content }} "
        "{% else %}A: {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
    )
    assert learned_texts({"messages": TURNS}, with_template(late)) == ["Hello!<|im_end|>", "5"]
    plain = late.replace("eos_token", "''")
    assert learned_texts({"messages": TURNS}, with_template(plain)) == ["Hello!", "5"]


def test_named_templates():
    tokenizer = with_template({"default": CHATML, "tool_use": (TEMPLATES / "qwen2.5.jinja").read_text()})
    assert learned_texts({"messages": TURNS}, tokenizer) == ["Hello!<|im_end|>", "5<|im_end|>"]
    assert learned_texts(CHATS["tools"], tokenizer)[0].startswith("<tool_call>")
    tokenizer.chat_template = {"default": marked("{%generation%}", "{%endgeneration%}"), "other": "x"}
    assert learned_texts({"messages": TURNS}, tokenizer) == ["Hello!<|im_end|>", "5<|im_end|>"]
    tokenizer.chat_template = {"one": CHATML, "two": CHATML}
    with pytest.raises(UserError, match="here:1: .*multiple chat templates with no default"):
        learned_texts({"messages": TURNS}, tokenizer)


@pytest.mark.parametrize(
    "template, message",
    [
        (CHATML.replace("message['content']", "message['content'][:1]"), "Lost: 'Hello!'"),
        (CHATML.replace("message['role'] +", "'user' +").replace("message['content']", "'x'"), "Lost: 'Hello!'"),
        ("{{ messages[0].content }}", "message 1 outside of a loop over the messages, or not at all"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}" * 2, "message 1 in several places"),
        (
            "{% set text %}" + CHATML + "{% endset %}{{ text[:20] + text[20:]|upper }}",
            "changes text that it has rendered",
        ),
        (marked("{% generation %}{% endgeneration %}", ""), "Lost: 'Hello!'"),
        (
            CHATML.replace("{% for", "{{ raise_exception('no') }}{% for"),
            "the model's chat template refuses this chat: no",
        ),
    ],
)
def test_templates_that_cannot_be_told_apart_are_refused(template, message):
    with pytest.raises(UserError, match=f"^here:1: .*{message}"):
        learned_texts({"messages": TURNS}, with_template(template))


def test_tools_that_a_template_leaves_out_are_refused():
    chat = {"messages": TURNS, "tools": CHATS["tools"]["tools"]}
    with pytest.raises(UserError, match="^here:1: the chat template does not write the tools"):
        learned_texts(chat, with_template(CHATML))


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_messages_that_a_template_leaves_out_are_refused(role):
    chat = {"messages": [{"role": role, "content": ' Speak "Latin"\n'}, *TURNS]}
    deaf = "{% for message in messages if message.content != ' Speak \"Latin\"\n' %}" + CHATML.split("%}", 1)[1]
    with pytest.raises(
        UserError,
        match=f"^here:1: the chat template does not write message 0 of the role '{role}'.*Lost: 'Speak \"Latin\"'",
    ):
        learned_texts(chat, with_template(deaf))
    for content in ("message['content'] | trim", "message['content'] | tojson"):  # written in another form
        text = CHATML.replace("message['content']", f"({content} if message.role == '{role}' else message['content'])")
        assert learned_texts(chat, with_template(text)) == ["Hello!<|im_end|>", "5<|im_end|>"]


def test_a_silent_turn_outside_of_the_loop_is_refused():
    """Else --learn all would learn it."""
    first = "{{ messages[0].content + messages[1].content }}{% for message in messages[2:] %}"
    silent = {"messages": [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]}
    with pytest.raises(UserError, match="^here:1: the chat template writes message 1 outside of a loop"):
        learned_texts(silent, with_template(first + CHATML.split("%}", 1)[1]), learn="all")


CALLING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }}(ARGUMENTS){% endfor %}{{ m.content or '' }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def calling(arguments):
    call = {"type": "function", "function": {"name": "w", "arguments": {"city": "Oslo", "now": True, "days": 3}}}
    chat = {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [call]}]}
    return learned_texts(chat, with_template(CALLING.replace("ARGUMENTS", "{{ " + arguments + " }}")))


@pytest.mark.parametrize("arguments", ["call.function.arguments", "call.function.arguments | tojson"])
def test_arguments_are_learned_as_json(arguments):
    assert calling(arguments) == ['<call>w({"city": "Oslo", "now": true, "days": 3})<|im_end|>']


def test_arguments_that_are_no_json_or_lost_are_refused():
    with pytest.raises(UserError, match="^here:1: .* prints the arguments of tool calls as Python does, not as JSON"):
        calling("call.function.arguments.items() | list and call.function.arguments")
    with pytest.raises(UserError, match="^here:1: .*Lost: '3'"):
        calling("'city Oslo now ' ~ call.function.arguments.now ~ ' days'")


def test_half_a_character_in_a_chat_is_named():
    chat = {"messages": [TURNS[0], {"role": "assistant", "content": "broken \ud83d here"}]}
    with pytest.raises(UserError, match="^here:1: not Unicode text"):
        learned_texts(chat, with_template(CHATML))


def test_a_template_prints_the_date_of_the_run():
    tokenizer = with_template("{{ strftime_now('%d %b %Y') }} " + CHATML)
    document = to_document({"messages": TURNS}, "here", Fields())
    text = lambda date: tokenizer.decode(tokenize(document, tokenizer, Labels(date=date))[0])
    assert text("2024-07-26").startswith("26 Jul 2024 ") and text("2025-01-02").startswith("02 Jan 2025 ")
    assert text(None).startswith(time.strftime("%d %b %Y"))


# ---------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("template", [CHATML, marked("{% generation %}", "{% endgeneration %}")])
def test_the_work_is_linear_in_the_turns(template, monkeypatch):
    """The number of renderings does not grow with the turns, and the text is tokenised once."""
    from alst_jax.data.templates import ChatTemplate

    tokenizer, render, rendered = with_template(template), ChatTemplate.render, []

    def counted(self, messages, *arguments, **options):
        rendered.append(len(messages))
        return render(self, messages, *arguments, **options)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    counts = []
    for turns in (10, 40):
        rendered.clear()
        learned_texts({"messages": TURNS * turns}, tokenizer)
        counts.append((len(rendered), sum(n > 10 for n in rendered)))
    assert counts[0] == counts[1] and counts[1][1] == 1 and counts[1][0] <= 3
