"""Show records as they are trained on, token by token, with what is learned marked.

    python -m trainer.show --data chats.jsonl --model MODEL [-n 3] [any flag of the trainer]

On a terminal learned tokens are coloured; elsewhere they stand between ⟦ and ⟧. Nothing is trained
and nothing is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from trainer.config import DataSettings, Settings, parse
from trainer.errors import TrainerError

__all__ = ["main", "parsed", "shown"]

_LEARNED, _READ, _PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
"""Escape sequences of a terminal: bold green, dim, and back to plain."""


def shown(ids: Sequence[int], learned: Sequence[bool], tokenizer: Any, *, colour: bool) -> str:
    """One row as text: its tokens with a bar between them, what is learned marked."""
    pairs = [
        (_readable(tokenizer, token), bool(flag)) for token, flag in zip(ids, learned, strict=True)
    ]
    out = []
    for flag, run in groupby(pairs, key=lambda pair: pair[1]):
        text = "│".join(token for token, _ in run)
        if colour:
            out.append(f"{_LEARNED if flag else _READ}{text}{_PLAIN}")
        else:
            out.append(f"⟦{text}⟧" if flag else text)
    return "│".join(out).replace("\\n│", "\\n│\n").replace("\\n⟧│", "\\n⟧│\n")


def parsed(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """This command's own flags, and the trainer's.

    Raises:
        TrainerError: a flag of the trainer that is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m trainer.show",
        description="Show records as they are trained on, token by token.",
        epilog="Further flags are those of python -m trainer: --template, --chat_template,"
        " --boundary, --model_max_length and so on.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", required=True, nargs="+", help="as --data_path of the trainer")
    parser.add_argument("--model", required=True, help="whose tokenizer and chat template it is")
    parser.add_argument("-n", type=int, default=3, metavar="N", help="records of each source (3)")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto")
    known, rest = parser.parse_known_args(argv)
    needed = ["--model_name_or_path", known.model, "--data_path", *known.data]
    return known, parse([*needed, "--output_dir", os.devnull, *rest])


def main(argv: Sequence[str] | None = None) -> int:
    """Show records; the exit code."""
    try:
        known, settings = parsed(argv)
        colour = known.colour == "always" or (known.colour == "auto" and sys.stdout.isatty())
        for line in _lines(settings, known.n, colour=colour):
            sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except TrainerError as exc:
        sys.stderr.write(f"trainer.show: {' '.join(str(exc).split())}\n")
        return exc.exit_code
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _lines(settings: Settings, count: int, *, colour: bool) -> Iterator[str]:
    from trainer.mixture import sources
    from trainer.model import load_tokenizer
    from trainer.records import BadRow, Records

    tokenizer = load_tokenizer(settings.model)
    for source in sources(settings.data.paths, settings.data):
        records = Records(source.paths, source.rules)
        notes: Counter[str] = Counter()
        for record in islice(records, count):
            if isinstance(record, BadRow):
                yield f"{record.name}: skipped: {record.why}\n"
                continue
            yield from _record(record, tokenizer, source.settings, notes, colour=colour)
        for note in notes:
            yield f"{source.name}: {note}"


def _record(
    record: Any, tokenizer: Any, settings: DataSettings, notes: Counter[str], *, colour: bool
) -> Iterator[str]:
    from trainer.tokens import Dropped, tokenise

    rows: Iterable[Any] = list(tokenise([record], tokenizer, settings, notes))
    for row in rows:
        if isinstance(row, Dropped):
            yield f"{row.name}: dropped: {row.reason}, {row.tokens:,} tokens {row.detail}".rstrip()
            continue
        total, learned = len(row.ids), int(row.learned.sum())
        yield f"{record.name}: {total:,} tokens, {learned:,} learned"
        yield shown(row.ids.tolist(), row.learned.tolist(), tokenizer, colour=colour)
        yield ""


def _readable(tokenizer: Any, token: int) -> str:
    """The text of one token; what would move a terminal's cursor or change its colours, escaped."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = piece.replace("▁", " ") if piece.startswith("▁") else tokenizer.decode([token])
    if "\ufffd" in text:  # a part of a character
        text = piece
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


if __name__ == "__main__":
    sys.exit(main())
