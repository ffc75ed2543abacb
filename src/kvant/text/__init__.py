"""Between text and token ids: tokenizer, chat templates, incremental detokenizing."""
