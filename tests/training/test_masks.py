from __future__ import annotations

import pytest
import tiny_model

from tfslurm.datasets.formats import ConversationRow, InstructionRow, Message, PretokenizedRow, TextPart, TextRow
from tfslurm.files import write_json
from tfslurm.training.base_tokenizer import BaseTokenizer
from tfslurm.training.masks import Encoded, Rejected, RowEncoder


@pytest.fixture
def encoder(tmp_path):
    """Makes an encoder with a chat template; `.learned(row)` gives the text that carries loss."""

    def make(template, **options):
        generation = options.pop("generation", None)
        tiny_model.save_tokenizer(tmp_path, template, **options)
        if generation:
            write_json(tmp_path / "generation_config.json", generation)
        return Encoder(BaseTokenizer(tmp_path))

    return make


class Encoder:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.rows = RowEncoder(tokenizer)

    def encode(self, row):
        return self.rows.encode([row])[0]

    def text(self, ids):
        return self.tokenizer.backend.decode(list(ids), skip_special_tokens=False)

    def learned(self, row):
        encoded = self.encode(row)
        assert isinstance(encoded, Encoded), encoded
        return [self.text(encoded.ids[start:end]) for start, end in encoded.spans]


def chat(*turns, tools=None, **last):
    messages = [Message(role=role, content=content) for role, content in turns]
    for key, value in last.items():
        setattr(messages[-1], key, value)
    return ConversationRow(messages=messages, tools=tools)


TALK = chat(("user", "hello"), ("assistant", "the cat"), ("user", "and?"), ("assistant", "the mat 🐈 é"))


@pytest.mark.parametrize("template", [tiny_model.CHATML, tiny_model.CHATML_MARKED], ids=["bare", "marked"])
def test_every_turn_of_the_assistant_with_its_end_is_learned_with_and_without_generation_markers(encoder, template):
    assert encoder(template).learned(TALK) == ["the cat<|im_end|>", "the mat 🐈 é<|im_end|>"]


def test_without_markers_transformers_own_mask_would_be_empty_and_with_them_it_agrees(encoder):
    """The trap, and an independent opinion: transformers' mask from generation markers."""
    made = encoder(tiny_model.CHATML_MARKED)
    messages = [{"role": m.role, "content": m.content} for m in TALK.messages]
    theirs = made.tokenizer.hugging_face.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = made.encode(TALK)
    ours = [any(start <= i < end for start, end in encoded.spans) for i in range(len(encoded.ids))]
    assert theirs["input_ids"][: len(ours)] == encoded.ids
    assert [bool(flag) for flag in theirs["assistant_masks"]][: len(ours)] == ours


@pytest.mark.parametrize(
    ("template", "eos", "learned"),
    [
        (tiny_model.HEADERS, "<|eot|>", ["the cat<|eot|>", "the mat 🐈 é<|eot|>"]),
        (tiny_model.INSTRUCT, "</s>", [" the cat</s>", " the mat 🐈 é</s>"]),
        (tiny_model.TOOLS, "<|im_end|>", ["the cat<|im_end|>", "the mat 🐈 é<|im_end|>"]),
        (tiny_model.THINKING, "<|im_end|>", ["the cat<|im_end|>", "<think>\n\n</think>\n\nthe mat 🐈 é<|im_end|>"]),
        (tiny_model.ENDLESS, "</s>", ["the cat\n", "the mat 🐈 é\n</s>"]),
    ],
    ids=["headers", "instruct", "tools", "thinking", "endless"],
)
def test_each_familys_template_gives_the_assistants_words_and_an_end(encoder, template, eos, learned):
    assert encoder(template, eos=eos).learned(TALK) == learned


def test_a_turn_may_end_with_another_token_than_eos_where_generation_stops_at_it(encoder):
    stops = encoder(tiny_model.TURNS, eos="</s>", generation={"eos_token_id": [4, 8]})
    assert stops.learned(TALK)[-1] == "the mat 🐈 é<end_of_turn>"


def test_eos_is_added_where_generation_would_not_stop_at_the_templates_end_of_turn(encoder):
    assert encoder(tiny_model.TURNS, eos="</s>").learned(TALK)[-1] == "the mat 🐈 é<end_of_turn></s>"


def test_eos_is_learned_although_it_is_the_padding_token_too(encoder):
    made = encoder(tiny_model.CHATML)
    assert made.tokenizer.hugging_face.pad_token_id == made.tokenizer.eos
    encoded = made.encode(TALK)
    assert encoded.ids[-1] == made.tokenizer.eos and encoded.spans[-1][1] == len(encoded.ids)


def test_a_template_that_writes_its_beginning_token_gets_no_second_one(encoder):
    made = encoder(tiny_model.HEADERS, eos="<|eot|>", bos="<|begin|>")
    assert made.tokenizer.beginning == [made.encode(TALK).ids[0]]
    assert made.encode(TALK).ids.count(made.tokenizer.beginning[0]) == 1


def test_plain_text_gets_the_beginning_token_once_and_is_learned_to_its_end(encoder):
    made = encoder(None, eos="</s>", bos="<s>")
    encoded = made.encode(TextRow("the cat sat"))
    assert made.text(encoded.ids) == "<s>the cat sat</s>"
    assert encoded.spans == [(1, len(encoded.ids))]


def test_the_first_token_is_never_learned_for_nothing_predicts_it(encoder):
    encoded = encoder(None).encode(TextRow("the cat sat"))
    assert encoded.spans == [(1, len(encoded.ids))]


def test_a_turn_of_weight_zero_is_read_but_not_learned(encoder):
    row = chat(("user", "a"), ("assistant", "no"), ("user", "b"), ("assistant", "yes"))
    row.messages[1].weight = 0
    made = encoder(tiny_model.CHATML)
    assert made.learned(row) == ["yes<|im_end|>"]
    assert "no<|im_end|>" in made.text(made.encode(row).ids)


def test_what_follows_the_last_learned_token_is_left_out(encoder):
    row = chat(("user", "a"), ("assistant", "yes"), ("user", "thanks"))
    made = encoder(tiny_model.CHATML)
    assert made.text(made.encode(row).ids).endswith("yes<|im_end|>")


def test_system_messages_and_content_in_parts_are_rendered(encoder):
    row = chat(("system", "be brief"), ("user", [TextPart("hel"), TextPart("lo")]), ("assistant", "yes"))
    made = encoder(tiny_model.CHATML)
    text = made.text(made.encode(row).ids)
    assert "system\nbe brief<|im_end|>" in text and "user\nhello<|im_end|>" in text and "You help" not in text


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def tool_talk():
    row = chat(("user", "sun?"), ("assistant", None), ("tool", "yes"), ("assistant", "it shines"), tools=[TOOL])
    row.messages[1].tool_calls = [CALL]
    return row


def test_a_tool_call_is_learned_with_its_arguments_as_an_object_and_the_tools_answer_is_not(encoder):
    assert encoder(tiny_model.TOOLS).learned(tool_talk()) == [
        '<call>{"name": "weather", "arguments": {"city": "Ulm"}}</call><|im_end|>',
        "it shines<|im_end|>",
    ]


def test_tool_calls_that_the_template_would_drop_reject_the_row(encoder):
    made = encoder(tiny_model.CHATML)
    assert made.encode(tool_talk()) == Rejected("the model's chat template leaves out the tools' descriptions")
    row = tool_talk()
    row.tools = None
    assert made.encode(row) == Rejected("the model's chat template leaves out tool calls")


def test_a_row_that_the_template_refuses_is_rejected_with_its_words(encoder):
    row = chat(("system", "be brief"), ("user", "a"), ("assistant", "b"))
    rejected = encoder(tiny_model.TURNS, eos="</s>").encode(row)
    assert rejected == Rejected("the chat template refuses it: System role not supported")


def test_a_conversation_that_the_assistant_opens_is_learned_from_its_first_word(encoder):
    assert encoder(tiny_model.CHATML).learned(chat(("assistant", "welcome"))) == ["welcome<|im_end|>"]


@pytest.mark.parametrize("row", [chat(("user", "a")), chat(("user", "a"), ("assistant", "b"), weight=0)])
def test_a_row_without_a_learned_token_is_rejected(encoder, row):
    assert encoder(tiny_model.CHATML).encode(row) == Rejected("no token of it carries loss")


def test_an_instruction_goes_through_the_chat_template(encoder):
    made = encoder(tiny_model.CHATML)
    row = InstructionRow("hello", "the cat")
    assert made.learned(row) == ["the cat<|im_end|>"]
    assert made.text(made.encode(row).ids).endswith(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe cat<|im_end|>"
    )


def test_an_instruction_without_a_template_is_prompt_response_and_eos(encoder):
    made = encoder(None, eos="</s>")
    assert made.learned(InstructionRow("hello ", "world")) == ["world</s>"]


def test_a_conversation_needs_a_chat_template(encoder):
    assert encoder(None).encode(TALK) == Rejected("the model has no chat template")


def test_pretokenized_labels_say_what_is_learned(encoder):
    made = encoder(None)
    assert made.encode(PretokenizedRow([5, 6, 7, 8, 9], [-100, 6, -100, 8, -100])) == Encoded(
        [5, 6, 7, 8], [(1, 2), (3, 4)]
    )
    assert made.encode(PretokenizedRow([5, 6, 7])) == Encoded([5, 6, 7], [(1, 3)])


def test_pretokenized_rows_that_no_model_could_learn_are_rejected(encoder):
    made = encoder(None)
    assert "neither -100 nor the token" in made.encode(PretokenizedRow([5, 6], [5, 7])).reason
    assert "vocabulary" in made.encode(PretokenizedRow([5, 10**6])).reason
    assert made.encode(PretokenizedRow([5])).reason == "no token of it carries loss"
