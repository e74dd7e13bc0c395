"""Documents and chats."""

CHAT = [
    {"role": "user", "content": "Wie spät?"},
    {"role": "assistant", "content": "Fünf 🕔"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
PAD = 258
