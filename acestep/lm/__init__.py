"""The planner stage: prompts, grammar, decoding engine. Metadata and audio codes out of a caption and lyrics."""
