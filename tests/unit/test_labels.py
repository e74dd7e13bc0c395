# pytest tests/unit/test_labels.py
"""What is learned of a chat: masks token by token for ten families of templates, and everything that is refused."""

import re

import jinja2
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from alst_jax.config import UserError
from alst_jax.data.labels import Labels, chat_template, tokenize
from alst_jax.data.records import Fields, to_document
from tests.unit.labelled import (
    CHATML,
    CHATS,
    TEMPLATES,
    TOKENS,
    TURNS,
    byte_tokenizer,
    family_tokenizer,
    learned_texts,
    marked,
    with_template,
)

DATE = Labels(date="2024-07-26")


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


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        marked("{% generation %}", "{% endgeneration %}"),
        marked("{%generation%}", "{%endgeneration%}"),
        marked("{%-  generation -%}", "{%- endgeneration  -%}"),
        marked("{%+ generation %}", "{%+ endgeneration %}"),
    ],
)
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
    for record, mask in (
        ({"text": "ab"}, "1111"),
        ({"text": "<s>ab"}, "1111"),
        ({"text": "<s>ab</s>"}, "1111"),
        ({"prompt": "a", "completion": "b"}, "0011"),
        ({"prompt": "<s>a", "completion": "b"}, "0011"),
        ({"prompt": "a", "completion": "b</s>"}, "0011"),
    ):
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


@pytest.mark.parametrize(
    "prompt, completion, learned",
    [("a ", "b", ["b</s>"]), ("a", " b", [" b</s>"]), ("a", " b ", [" b </s>"]), (" a\n", "\nb", ["\nb</s>"])],
)
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


VICUNA = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ 'USER: ' + message.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)


def test_a_token_that_joins_prompt_and_answer_is_learned():
    tokenizer = word_tokenizer(["USER:", "ASSISTANT:", "hi", "hello", "there"])
    tokenizer.chat_template = VICUNA
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]}
    tokens, learned = tokenize(to_document(chat, "here", Fields()), tokenizer)
    pieces = list(zip(tokenizer.convert_ids_to_tokens(tokens), learned.tolist()))
    assert pieces == [
        ("USER:", False),
        ("▁hi", False),
        ("▁ASSISTANT:", False),
        ("▁hello", True),
        ("▁there", True),
        ("</s>", True),
    ]
    joined = {"prompt": "USER: ", "completion": "hello"}
    tokens, learned = tokenize(to_document(joined, "here", Fields()), tokenizer)
    assert list(zip(tokenizer.convert_ids_to_tokens(tokens), learned.tolist())) == [
        ("USER:", False),
        ("▁hello", True),
        ("</s>", True),
    ]
