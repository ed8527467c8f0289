"""Reads a report as a browser would, without one: its text, its tables, its attributes."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr", "path", "use", "image", "stop"}


class Page(HTMLParser):
    """tags: (name, attributes) of every start tag; text: what is between tags, scripts and styles left out."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.unclosed, self._open = [], "", [], []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if self._open and self._open[-1] == tag:
            self._open.pop()
        else:
            self.unclosed.append(tag)

    def handle_data(self, data):
        if not self._open or self._open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]
