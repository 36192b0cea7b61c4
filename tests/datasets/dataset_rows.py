"""One good row of each format."""

ROWS = {
    "conversational": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    "instruction": {"prompt": "2+2?", "completion": "4"},
    "text": {"text": "Once upon a time."},
    "pretokenized": {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
}
