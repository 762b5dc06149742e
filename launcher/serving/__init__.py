"""Serving: several adapters of one base behind an OpenAI-compatible endpoint, in one process."""
