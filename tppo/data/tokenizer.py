"""A tokenizer of single characters, saved as an ordinary Hugging Face tokenizer."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tppo.data.arithmetic import END, NAMES, SYMBOLS

PAD, UNKNOWN = "<pad>", "<unk>"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """The arithmetic task's alphabet. `$` ends a response; padding has an id that no response contains."""
    vocabulary = [PAD, UNKNOWN, *SYMBOLS, *NAMES]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
