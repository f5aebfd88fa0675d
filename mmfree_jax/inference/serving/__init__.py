"""A server of the OpenAI completions shape.

bodies.py   what a request asks for: a JSON body, checked field by field
chat.py     messages -> prompt, by the chat template that comes with a model
answers.py  what an engine tells -> the objects that clients read
app.py      the paths, the key, the limits, the metrics
server.py   the process: the engine's thread, the socket, signals; the `serve` command
"""
