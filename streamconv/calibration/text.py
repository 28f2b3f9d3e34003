"""How much text a calibration reads, and that it is enough."""

from __future__ import annotations

from torch import Tensor

from streamconv.calibration.model import Model
from streamconv.calibration.subject import Subject
from streamconv.errors import OptionError
from streamconv.forward.text import load_tokenizer, read_windows

LONGEST = 2048
# Of fewer tokens for each input of the widest weight, second moments say too little: results were worse than without.
TOKENS_AN_INPUT = 2


def text_shape(subject: Subject, model: Model) -> tuple[int, int]:
    """Sequences and their length. Raises OptionError for too few tokens, and for longer sequences than the model's."""
    text, config = subject.text, model.walk.skeleton.text_config
    longest = getattr(config, "max_position_embeddings", None)
    positions = longest if isinstance(longest, int) else None
    length = text.sequence_length or min(LONGEST, positions or LONGEST)
    if positions is not None and length > positions:
        raise OptionError(
            f"calibration sequences of {length} tokens are more than the {positions} positions of "
            f"{model.walk.skeleton.location}; give that or less"
        )
    count, widest = text.tokens // length, model.widest
    least = TOKENS_AN_INPUT * widest.columns if widest is not None else 1
    if count * length < least:
        raise OptionError(
            f"--calibration-tokens {text.tokens} is too few for {widest.name if widest else 'the model'}, which has "
            f"{least // TOKENS_AN_INPUT} inputs; give at least {-(-least // length) * length}"
        )
    return count, length


def calibration_windows(subject: Subject, model: Model) -> Tensor:
    """The text as tokens [sequence, token]. Raises InputError where it is too short or cannot be read."""
    count, length = text_shape(subject, model)
    tokenizer = load_tokenizer(subject.tokenizer)
    return read_windows(subject.text.data, tokenizer, count, length, "--calibration-tokens")
