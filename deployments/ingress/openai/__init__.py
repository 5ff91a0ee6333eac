"""ACE-Step's chat API, as OpenAI's clients speak it."""
