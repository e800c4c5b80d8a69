"""`mot-bench serve`: an OpenAI-compatible server under load, seen from its clients.

`command` is the command line, `settings` what it says, `prompts` what is asked, `endpoints` the
requests and answers of each endpoint, `load` when they are sent, `results` what is kept of them.
"""
