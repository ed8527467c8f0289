"""From a row's problem to the text that the model continues: a template around it, then the tokenizer's own."""

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from profiling.errors import ConfigError, DataError, first_line

PLACE = "{problem}"


@dataclass(frozen=True)
class Prompter:
    tokenizer: PreTrainedTokenizerBase
    system: str
    """"": none."""
    template: str
    """Text with {problem} in it; other braces stand for themselves."""
    chat: bool
    """Whether the tokenizer's chat template is applied."""

    def prompt(self, problem: str | list[dict[str, str]]) -> str:
        """problem: text, or chat messages of which the last is the problem and a system message gives way to ours.
        Raises ConfigError."""
        messages = [{"role": "user", "content": problem}] if isinstance(problem, str) else problem
        if self.system:
            others = [message for message in messages if message["role"] != "system"]
            messages = [{"role": "system", "content": self.system}, *others]
        last = messages[-1]
        messages = [*messages[:-1], {**last, "content": self.template.replace(PLACE, last["content"])}]
        if not self.chat:
            return "\n\n".join(message["content"] for message in messages)
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:  # jinja's errors, and those that templates raise themselves
            reason = first_line(error)
            raise ConfigError(
                f"data.chat_template: the tokenizer's template fails: {type(error).__name__}: {reason}; set data."
                'system_prompt = "" where it takes no system message, or data.chat_template = "never"'
            ) from None


def identities(problem: str | list[dict[str, str]], template: str) -> frozenset[str]:
    """By which problems of two data sets are the same: the words, system messages left out, as they are and inside
    the template, since some data sets have an instruction in theirs. Without spaces, in one case."""
    words = (
        [problem] if isinstance(problem, str) else [each["content"] for each in problem if each["role"] != "system"]
    )
    *before, last = words or [""]
    texts = (last, template.replace(PLACE, last))
    return frozenset("".join("".join([*before, text]).split()).casefold() for text in texts)


def prompter_of(
    tokenizer: PreTrainedTokenizerBase, system: str, template: str, chat: Literal["auto", "always", "never"]
) -> Prompter:
    """Raises ConfigError when a chat template is asked for and the tokenizer has none."""
    has_one = bool(tokenizer.chat_template)
    if chat == "always" and not has_one:
        raise ConfigError('data.chat_template = "always": the tokenizer of model.path has none; set "auto" or "never"')
    return Prompter(tokenizer, system, template, has_one and chat != "never")


def problem_of(value: Any, where: str) -> str | list[dict[str, str]] | None:
    """A column's value as a problem; None where it is empty. Raises DataError when it is neither text nor messages."""
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    ):
        return [{"role": message["role"], "content": message["content"]} for message in value]
    raise DataError(f"{where}: a problem is text or a list of {{role, content}} messages, not {type(value).__name__}")
