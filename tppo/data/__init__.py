"""Problems: the built-in task, data sets, prompts, tokenizers."""
