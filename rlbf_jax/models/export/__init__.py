"""What an exported checkpoint folder carries beside weights and tokenizer,
so that other programs edit as we do."""
