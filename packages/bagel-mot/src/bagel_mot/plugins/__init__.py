"""What vLLM and vLLM-Omni find through entry points; importing any of it imports neither."""
