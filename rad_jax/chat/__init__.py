"""Questions to language models behind any OpenAI-compatible chat endpoint, a local one by default."""
