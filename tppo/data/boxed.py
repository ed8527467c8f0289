"""The final answer of a written solution: the content of its last \\boxed{...}."""

import re

OPENING = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} or \\fbox, braces balanced; also of `\\boxed 7`. None without one, or where
    the braces of the last never close."""
    openings = list(OPENING.finditer(text))
    if not openings:
        return None
    start = openings[-1].end()
    if text[start : start + 1] != "{":
        bare = re.match(r"[^\s$\\.,;]+", text[start:])
        return bare.group() if bare else None
    depth, position = 0, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 2  # \{ and \} are set braces, not groups
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start + 1 : position].strip() or None
        position += 1
    return None
