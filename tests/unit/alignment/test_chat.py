import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignment import chat, tokenizer
from alignment.errors import UserError

WITHOUT_MARKS = chat.CHATML.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


TWO_TURNS = [user("Hi"), assistant("Yo!"), user("1+1"), assistant("2")]
CONVERSATIONS = [
    TWO_TURNS,
    [system("Think first."), user("3 x 15?"), assistant("<think>3 x 15 = 45</think> \\boxed{45}")],
    [user("ส้มสามผล"), assistant("45 บาท 😀"), user("giá?"), assistant("1.234,5 đồng")],
    [user("a"), assistant(" leading space"), user("b\n"), assistant("trailing \n\n")],
    [user("a"), assistant(""), user("b"), assistant("two"), assistant("turns")],
    [user("call"), assistant("{}"), {"role": "tool", "content": "12"}, assistant("12")],
]


def with_template(base: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    changed = copy.deepcopy(base)
    changed.chat_template = template
    return changed


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerFast:
    """A tokenizer without merges: one token a byte, and the special tokens."""
    made = tokenizer.train(iter(["a"]), vocab_size=300, max_length=512)
    assert len(made) == 256 + 5 + len(tokenizer.ROUND_THOUSANDS)
    return made


@pytest.mark.parametrize("template", [chat.CHATML, WITHOUT_MARKS], ids=["marks", "no marks"])
def test_two_turns_token_by_token(bytewise: PreTrainedTokenizerFast, template: str) -> None:
    """Written by hand, one character a token: ( is <|im_start|>, ) is <|im_end|>, / a newline; # is trained."""
    by_hand = [
        ("(user/", "......"),
        ("Hi)/", "...."),
        ("(assistant/", "..........."),
        ("Yo!)/", "####."),
        ("(user/", "......"),
        ("1+1)/", "....."),
        ("(assistant/", "..........."),
        ("2)/", "##."),
    ]
    names = {"(": chat.TURN_START, ")": chat.TURN_END, "/": "\n"}
    tokens = [names.get(c, c) for text, _ in by_hand for c in text]
    mask = [c == "#" for _, marks in by_hand for c in marks]
    rendered = chat.render(with_template(bytewise, template), TWO_TURNS)
    assert [bytewise.decode([i]) for i in rendered.input_ids] == tokens
    assert rendered.assistant_mask == mask


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_prefixes_give_the_mask_that_marks_give(
    tiny_tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]
) -> None:
    marked = chat.render(tiny_tokenizer, messages)
    assert any(marked.assistant_mask)
    assert chat.render(with_template(tiny_tokenizer, WITHOUT_MARKS), messages) == marked


@pytest.mark.parametrize("template", [chat.CHATML, WITHOUT_MARKS], ids=["marks", "no marks"])
def test_many_at_once_are_what_they_are_one_by_one(tiny_tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    """And what transformers gives, where the template has marks."""
    changed = with_template(tiny_tokenizer, template)
    together = chat.render_all(changed, CONVERSATIONS)
    assert together == [chat.render(changed, messages) for messages in CONVERSATIONS]
    theirs = tiny_tokenizer.apply_chat_template(CONVERSATIONS, return_dict=True, return_assistant_tokens_mask=True)
    assert [rendered.input_ids for rendered in together] == theirs["input_ids"]
    assert [rendered.assistant_mask for rendered in together] == theirs["assistant_masks"]


# thinking


THOUGHT = assistant("<think>\n1 and 1\n</think>\nTwo.")


@pytest.mark.parametrize(
    ("messages", "same"),
    [
        ([user("1+1")], [system(chat.THINKING_PROMPT), user("1+1")]),
        (
            [system("Be kind."), user("1+1"), THOUGHT],
            [system(f"Be kind.\n\n{chat.THINKING_PROMPT}"), user("1+1"), THOUGHT],
        ),
        ([system(f"Be kind. {chat.THINKING_PROMPT}"), user("1+1"), THOUGHT], None),
        (
            [user("a"), THOUGHT, user("b"), THOUGHT],
            [system(chat.THINKING_PROMPT), user("a"), THOUGHT, user("b"), THOUGHT],
        ),
    ],
)
def test_the_switch_is_the_system_prompt(
    tiny_tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], same: list[dict[str, Any]] | None
) -> None:
    """What transformers and vLLM render under `enable_thinking` is what training renders of the rows."""
    options: dict[str, Any] = {"add_generation_prompt": messages[-1]["role"] == "user", "return_dict": False}
    on = tiny_tokenizer.apply_chat_template(messages, enable_thinking=True, **options)
    assert on == tiny_tokenizer.apply_chat_template(same or messages, **options)
    assert tiny_tokenizer.decode(on).count(chat.THINKING_PROMPT) == 1
    off = tiny_tokenizer.apply_chat_template(messages, enable_thinking=False, **options)
    assert off == tiny_tokenizer.apply_chat_template(messages, **options)
    if messages[-1]["role"] == "assistant":
        assert chat.render(tiny_tokenizer, messages, enable_thinking=True).input_ids == on


@pytest.mark.parametrize("first", ["", "<think></think>", "<think>\n\n</think>\n\n", "<think>long\nthoughts</think>\n"])
def test_thinking_of_earlier_turns_is_dropped_and_they_are_not_trained(
    bytewise: PreTrainedTokenizerFast, first: str
) -> None:
    messages = [user("a"), assistant(f"{first}One."), user("b"), THOUGHT]
    rendered = chat.render(bytewise, messages)
    text = bytewise.decode(rendered.input_ids)
    assert (
        "(user/a)/(assistant/One.)/(user/b)/(assistant/".translate(
            {ord("("): chat.TURN_START, ord(")"): chat.TURN_END, ord("/"): "\n"}
        )
        == text[: text.index("<think>\n1 and 1")]
    )
    trained = bytewise.decode([i for i, m in zip(rendered.input_ids, rendered.assistant_mask, strict=True) if m])
    assert trained == ("" if first else "One." + chat.TURN_END) + THOUGHT["content"] + chat.TURN_END
    prompt = chat.render_prompt(bytewise, messages[:-1])
    assert prompt + chat.render_completion(bytewise, THOUGHT["content"]) == rendered.input_ids[:-1]


def test_thinking_before_a_tool_s_answer_stays_and_is_trained(bytewise: PreTrainedTokenizerFast) -> None:
    """No user has spoken since, so the model still works on one answer."""
    messages = [user("a"), assistant("<think>x</think>{}"), {"role": "tool", "content": "12"}, THOUGHT]
    rendered = chat.render(bytewise, messages)
    trained = bytewise.decode([i for i, m in zip(rendered.input_ids, rendered.assistant_mask, strict=True) if m])
    assert trained == "<think>x</think>{}" + chat.TURN_END + THOUGHT["content"] + chat.TURN_END


def test_every_token_of_a_character_at_a_marks_edge_is_trained(bytewise: PreTrainedTokenizerFast) -> None:
    """The four bytes of an emoji are four tokens; transformers 5.17 marks the first of them where a mark ends there."""
    template = "x{% generation %}{{ messages[0]['content'] }}{% endgeneration %}y"
    rendered = chat.render(with_template(bytewise, template), [assistant("😀a😀")])
    assert rendered.assistant_mask == [False, *[True] * 9, False]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_trained_tokens_are_the_answers_and_their_stops(
    tiny_tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]
) -> None:
    rendered = chat.render(tiny_tokenizer, messages)
    trained = [i for i, kept in zip(rendered.input_ids, rendered.assistant_mask, strict=True) if kept]
    answers = [m["content"] + chat.TURN_END for m in messages if m["role"] == "assistant"]
    assert tiny_tokenizer.decode(trained) == "".join(answers)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_sampling_continues_what_training_saw(
    tiny_tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]
) -> None:
    """Prompt and completion, tokenized apart, are the tokens of the whole conversation but for its last newline."""
    whole = chat.render(tiny_tokenizer, messages).input_ids
    prompt = chat.render_prompt(tiny_tokenizer, messages[:-1])
    completion = chat.render_completion(tiny_tokenizer, messages[-1]["content"])
    assert prompt + completion == whole[:-1]
    assert completion[-1] == chat.stop_token_id(tiny_tokenizer)


@pytest.mark.parametrize("mark", ["{% generation %}", "{%- generation-%}", "{%generation%}", "{%-  generation %}"])
def test_marks_are_found_however_they_are_spaced(tiny_tokenizer: PreTrainedTokenizerFast, mark: str) -> None:
    template = chat.CHATML.replace("{%- generation -%}", mark)
    first = [assistant("I speak first"), user("ok")]  # which only marks can tell
    assert chat.render(with_template(tiny_tokenizer, template), first).assistant_mask.count(True) > 3


def test_assistant_first_needs_marks(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="nothing comes before the assistant's first turn; add"):
        chat.render(with_template(tiny_tokenizer, WITHOUT_MARKS), [assistant("I speak first")])


def test_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """As templates do that drop the thinking of all turns but the last."""
    forgetful = WITHOUT_MARKS.replace(
        "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
    )
    thinking = [user("a"), assistant("<think>x</think>y"), user("b"), assistant("<think>x</think>z")]
    with pytest.raises(UserError, match="rewrites earlier turns"):
        chat.render(with_template(tiny_tokenizer, forgetful), thinking)


def test_template_that_refuses_a_role_is_the_users_mistake(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + chat.CHATML
    with pytest.raises(UserError, match="its chat template refuses a conversation: no system role"):
        chat.render(with_template(tiny_tokenizer, strict), [system("x"), user("y")])


def test_tokenizer_without_template_or_stop_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    bare = with_template(tiny_tokenizer, None)
    for call in (chat.render, chat.render_prompt):
        with pytest.raises(UserError, match="has no chat template"):
            call(bare, TWO_TURNS)
    bare.eos_token = None
    with pytest.raises(UserError, match="has no eos_token"):
        chat.render_completion(bare, "x")
