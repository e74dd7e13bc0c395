# pytest tests/unit/test_labels.py
"""What is learned of a chat: masks token by token for ten families of templates, and everything that is refused."""

import json
import pathlib
import re
import time

import jinja2
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alst_jax.config import UserError
from alst_jax.data.labels import Labels, chat_template, tokenize
from alst_jax.data.records import Fields, to_document

TEMPLATES = pathlib.Path(__file__).parents[1] / "data/templates"
TOKENS = json.loads((TEMPLATES / "tokens.json").read_text())
CHATS = json.loads((TEMPLATES / "chats.json").read_text())
DATE = Labels(date="2024-07-26")


def byte_tokenizer(bos=None, eos=None, added=()):
    """One token a byte, and these special tokens."""
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos,
                                   additional_special_tokens=list(added))


def family_tokenizer(family):
    tokenizer = byte_tokenizer(**TOKENS[family])
    tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text()
    return tokenizer


def expectations():
    """(family, case, expected text) of the hand-written files; learned text is in double brackets."""
    for family in TOKENS:
        sections = re.split(r"^=== (.*)\n", (TEMPLATES / f"{family}.txt").read_text(), flags=re.M)[1:]
        for case, text in zip(sections[::2], sections[1::2]):
            if case != "end":
                yield pytest.param(family, case, text.removesuffix("\n"), id=f"{family}, {case}")


def expected_tokens(text, tokenizer):
    """Tokens and mask of a text whose learned parts are in brackets."""
    ids, mask = [], []
    for i, part in enumerate(re.split("[⟦⟧]", text)):
        tokens = tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += tokens
        mask += [i % 2 == 1] * len(tokens)
    return ids, mask


@pytest.mark.parametrize("family, case, expected", expectations())
def test_the_learned_tokens_of_a_family(family, case, expected):
    tokenizer, document = family_tokenizer(family), to_document(CHATS[case], "here:1", Fields())
    if expected.startswith("REFUSED: "):
        with pytest.raises(UserError, match="^here:1: .*" + re.escape(expected.removeprefix("REFUSED: "))):
            tokenize(document, tokenizer, DATE)
        return
    tokens, learned = tokenize(document, tokenizer, DATE)
    ids, mask = expected_tokens(expected, tokenizer)
    assert tokenizer.decode(tokens) == tokenizer.decode(ids)
    assert tokens.tolist() == ids and learned.tolist() == mask


def test_every_family_is_tried_with_system_and_turns():
    cases = {family: {p.values[1] for p in expectations() if p.values[0] == family} for family in TOKENS}
    assert len(cases) == 10 and all({"turns", "system"} <= tried for tried in cases.values())


@pytest.mark.parametrize("family", [family for family in TOKENS if family != "llama-3.1"])
def test_the_text_is_what_transformers_renders(family):
    """Except for today's date."""
    tokenizer = family_tokenizer(family)
    for case in ("turns", "system", "thinking"):
        try:
            expected = tokenizer.apply_chat_template(CHATS[case]["messages"], tokenize=False)
        except jinja2.TemplateError:  # the template refuses this chat
            continue
        messages = to_document(CHATS[case], "here", Fields()).content
        assert chat_template(tokenizer, None, DATE).render(messages).text == expected


# ------------------------------------------------------------------------------------------------ which turns, and text

CHATML = family_tokenizer("chatml").chat_template
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"},
         {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]


def learned_texts(record, tokenizer, **labels):
    """The decoded runs of learned tokens."""
    tokens, learned = tokenize(to_document(record, "here:1", Fields()), tokenizer, Labels(**labels))
    runs = np.split(np.arange(tokens.size), np.flatnonzero(np.diff(learned)) + 1)
    return [tokenizer.decode(tokens[run]) for run in runs if learned[run[0]]]


def with_template(template, **tokens):
    tokenizer = byte_tokenizer(**({"eos": "<|im_end|>", "added": ["<|im_start|>"]} | tokens))
    tokenizer.chat_template = template
    return tokenizer


MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}GENERATION{{ message.content + '<|im_end|>' }}END"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}")


def marked(generation, end):
    return MARKED.replace("GENERATION", generation).replace("END", end)


@pytest.mark.parametrize("template", [
    CHATML, marked("{% generation %}", "{% endgeneration %}"), marked("{%generation%}", "{%endgeneration%}"),
    marked("{%-  generation -%}", "{%- endgeneration  -%}"), marked("{%+ generation %}", "{%+ endgeneration %}")])
def test_learn_and_weights(template):
    tokenizer = with_template(template)
    texts = lambda chat=TURNS, **labels: learned_texts({"messages": chat}, tokenizer, **labels)
    assert texts() == ["Hello!<|im_end|>", "5<|im_end|>"]
    assert texts(learn="last") == ["5<|im_end|>"]
    assert texts([*TURNS, {"role": "user", "content": "Thanks"}], learn="last") == ["5<|im_end|>"]
    silent = [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    assert texts(silent) == ["5<|im_end|>"]
    everything = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert texts(learn="all") == [everything]
    assert texts(silent, learn="all") == everything.split("<|im_start|>assistant\nHello!<|im_end|>\n")
    with pytest.raises(UserError, match="here:1: nothing in the chat is to be learned: --learn last"):
        texts([*TURNS[:3], TURNS[3] | {"weight": 0}], learn="last")


def test_of_a_prompt_and_its_completion_the_completion_is_learned():
    tokenizer = with_template(CHATML)
    assert learned_texts({"prompt": "2+3=", "completion": "5"}, tokenizer) == ["5<|im_end|>"]
    assert learned_texts({"prompt": "2+3=", "completion": "5"}, tokenizer, learn="all") == ["2+3=5<|im_end|>"]
    assert learned_texts({"prompt": TURNS[:3], "completion": TURNS[3:]}, tokenizer) == ["5<|im_end|>"]
    assert learned_texts({"instruction": "2+3?", "output": "5"}, tokenizer) == ["5<|im_end|>"]


def test_a_text_has_one_begin_token():
    """Also if it is a rendered chat, which begins with the token's text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(bos="<s>", eos="</s>")
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    plain = tokenizer("ab")["input_ids"]
    assert plain[0] == begin and len(plain) == 3
    for record, mask in (({"text": "ab"}, "1111"), ({"text": "<s>ab"}, "1111"), ({"text": "<s>ab</s>"}, "1111"),
                         ({"prompt": "a", "completion": "b"}, "0011"), ({"prompt": "<s>a", "completion": "b"}, "0011"),
                         ({"prompt": "a", "completion": "b</s>"}, "0011")):
        tokens, learned = tokenize(to_document(record, "here", Fields()), tokenizer)
        assert tokens.tolist() == [*plain, tokenizer.eos_token_id]
        assert "".join(str(int(flag)) for flag in learned) == mask


def test_a_text_has_one_end_token():
    """Also if the text ends with it, and the tokenizer adds it."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(eos="</s>")
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    plain = tokenizer("ab")["input_ids"]
    for record in ({"text": "ab"}, {"text": "ab</s>"}, {"prompt": "a", "completion": "b</s>"}):
        assert tokenize(to_document(record, "here", Fields()), tokenizer)[0].tolist() == plain
    assert plain[-1] == end and len(plain) == 3


@pytest.mark.parametrize("prompt, completion, learned", [
    ("a ", "b", ["b</s>"]), ("a", " b", [" b</s>"]), ("a", " b ", [" b </s>"]), (" a\n", "\nb", ["\nb</s>"])])
def test_offsets_without_white_space(prompt, completion, learned):
    from tokenizers.processors import ByteLevel

    tokenizer = byte_tokenizer(eos="</s>")
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    assert learned_texts({"prompt": prompt, "completion": completion}, tokenizer) == learned


def word_tokenizer(words):
    """Tokens are words with the space before them, so that the last space of a prompt joins the answer."""
    pieces = {piece: i for i, piece in enumerate(["<unk>", "▁", *(f"▁{word}" for word in words), *words, ":", "\n"])}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


VICUNA = ("{% for message in messages %}{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
          "{% else %}{{ 'ASSISTANT: ' + message.content + eos_token }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}")


def test_a_token_that_joins_prompt_and_answer_is_learned():
    tokenizer = word_tokenizer(["USER:", "ASSISTANT:", "hi", "hello", "there"])
    tokenizer.chat_template = VICUNA
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]}
    tokens, learned = tokenize(to_document(chat, "here", Fields()), tokenizer)
    pieces = list(zip(tokenizer.convert_ids_to_tokens(tokens), learned.tolist()))
    assert pieces == [("USER:", False), ("▁hi", False), ("▁ASSISTANT:", False), ("▁hello", True), ("▁there", True),
                      ("</s>", True)]
    joined = {"prompt": "USER: ", "completion": "hello"}
    tokens, learned = tokenize(to_document(joined, "here", Fields()), tokenizer)
    assert list(zip(tokenizer.convert_ids_to_tokens(tokens), learned.tolist())) == [
        ("USER:", False), ("▁hello", True), ("</s>", True)]


# ----------------------------------------------------------------------------------------------------------- templates


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


@pytest.mark.parametrize("answer", [
    "assistant", "user", "<|im_start|>assistant\n", "Hi", "<|im_end|>", "  5 ", "\n5\n"])
def test_answers_that_look_like_the_template(answer):
    chat = {"messages": [TURNS[0], {"role": "assistant", "content": answer}, *TURNS[2:]]}
    assert learned_texts(chat, with_template(CHATML)) == [f"{answer}<|im_end|>", "5<|im_end|>"]


def test_thoughts_are_lost_although_the_answer_has_the_same_text():
    chat = {"messages": [TURNS[0], {"role": "assistant", "reasoning_content": "5", "content": "5"}]}
    with pytest.raises(UserError, match="leaves text of message 1 out of what is learned. Lost: '5'"):
        learned_texts(chat, with_template(CHATML))


def test_an_end_token_in_front_of_the_next_turn_is_learned():
    late = ("{% for m in messages %}{% if m.role == 'user' %}{{ '' if loop.first else eos_token }}U: {{ m.content }} "
            "{% else %}A: {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}")
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


@pytest.mark.parametrize("template, message", [
    (CHATML.replace("message['content']", "message['content'][:1]"), "Lost: 'Hello!'"),
    (CHATML.replace("message['role'] +", "'user' +").replace("message['content']", "'x'"), "Lost: 'Hello!'"),
    ("{{ messages[0].content }}", "message 1 outside of a loop over the messages, or not at all"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}" * 2, "message 1 in several places"),
    ("{% set text %}" + CHATML + "{% endset %}{{ text[:20] + text[20:]|upper }}", "changes text that it has rendered"),
    (marked("{% generation %}{% endgeneration %}", ""), "Lost: 'Hello!'"),
    (CHATML.replace("{% for", "{{ raise_exception('no') }}{% for"), "the model's chat template refuses this chat: no"),
])
def test_templates_that_cannot_be_told_apart_are_refused(template, message):
    with pytest.raises(UserError, match=f"^here:1: .*{message}"):
        learned_texts({"messages": TURNS}, with_template(template))


def test_tools_that_a_template_leaves_out_are_refused():
    chat = {"messages": TURNS, "tools": CHATS["tools"]["tools"]}
    with pytest.raises(UserError, match="^here:1: the chat template does not write the tools"):
        learned_texts(chat, with_template(CHATML))


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_messages_that_a_template_leaves_out_are_refused(role):
    chat = {"messages": [{"role": role, "content": " Speak \"Latin\"\n"}, *TURNS]}
    deaf = "{% for message in messages if message.content != ' Speak \"Latin\"\n' %}" + CHATML.split("%}", 1)[1]
    with pytest.raises(UserError, match=f"^here:1: the chat template does not write message 0 of the role '{role}'.*"
                                        "Lost: 'Speak \"Latin\"'"):
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
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


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
