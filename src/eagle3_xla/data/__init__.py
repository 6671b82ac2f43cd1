"""Chats to fixed-shape rows of token ids: reading, chat template, assistant mask, draft vocabulary, packing."""
