"""OpenAI's protocol: bodies of requests, and answers as JSON and as events."""
