"""Where the covering tree of a prompt begins: how much of the prompt is taken as the tokens that it is given as."""

from __future__ import annotations

from isoflop.models.byte_trees.segmentations import Segmentations
from isoflop.models.byte_trees.tree import Start
from isoflop.models.byte_trees.vocabulary import ByteVocabulary, whole_characters


def boundary_start(segmentations: Segmentations, data: bytes, first: int) -> Start:
    """Begin at the last cut of the prompt that no continuation can move; before it only one segmentation is possible.

    Raises:
        ValueError: there is no such cut, and the tokenizer puts no token before a text.
    """
    cut = 0
    for at in range(1, first + 1):  # step by step, because a pattern looks at what follows, never at what was
        cut += segmentations.settled(data[cut:at])
    return Start(data, _context(segmentations.vocabulary, data[:cut]), cut, first)


def prompt_start(vocabulary: ByteVocabulary, data: bytes, first: int) -> Start:
    """Begin behind the prompt, whose tokens are taken as they are; behind its last whole character, if it ends inside one."""
    whole = whole_characters(data[:first])
    return Start(data, _context(vocabulary, data[:whole]), whole, first)


def healed_start(vocabulary: ByteVocabulary, data: bytes, first: int) -> Start:
    """Begin before the last token of the prompt; the next token must start with its bytes.

    A prompt that ends inside a character gives no token there, so that nothing needs healing.

    Raises:
        ValueError: nothing is left of the prompt.
    """
    if whole_characters(data[:first]) < first:
        return prompt_start(vocabulary, data, first)
    *context, last = vocabulary.encode(data[:first])
    forced = vocabulary.bytes_of[last]
    if not context and not vocabulary.start_ids:
        raise ValueError(f"nothing is left of the prompt {data[:first]!r} before its last token")
    return Start(data, [*vocabulary.start_ids, *context], first - len(forced), first, forced)


def _context(vocabulary: ByteVocabulary, prompt: bytes) -> list[int]:
    context = [*vocabulary.start_ids, *vocabulary.encode(prompt)]
    if not context:
        raise ValueError(f"the prompt {prompt!r} has no token to begin with")
    return context
