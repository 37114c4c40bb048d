"""Rounds: generate, export, train, measure, keep or not; and the same again from what was kept.

    seeds ─▶ people/            once: tasks to show and train on, tasks to measure by
    round-N/run/                woolmill generate, by the model of the round before
    round-N/data/               its rows, validation split off by cluster
    round-N/training/ ─▶ model/ python -m trainer or torchrun, from checkpoints where it was cut
    round-N/loss/               held-out loss of the model, and that on its own validation rows
    ledger.jsonl                one line more; then what --keep does not cover is deleted

Each step leaves a folder that is there whole or not at all, and is passed over where it is: the
same command goes on wherever the last start was cut. What a step makes follows from settings and
from the folders before it alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine import models
from engine.errors import ConfigError, OutputError, StoppedError
from engine.export import export_dataset
from engine.export.options import Options
from engine.failpoints import failpoint
from engine.files import cannot_write
from engine.loop.figures import figures_of
from engine.loop.ledger import Ledger, Round, Start
from engine.loop.people import HELD_OUT, SHOWN, apart, set_apart
from engine.loop.settings import LoopConfig
from engine.loop.training import losses, trainer
from engine.recipes.seeds import bundled_seeds, read_seeds
from engine.settings import RunConfig
from engine.store import RunReader
from engine.store.lock import RunLock

__all__ = ["Loop"]

TRAIN, VALIDATION = "train-00000-of-00001.jsonl", "validation-00000-of-00001.jsonl"
ONE_FILE = 2**40
"""Rows of a shard: all."""


class Loop:
    """The loop in a folder; a context manager that holds the folder for itself.

    Args:
        config: its settings.
        generate: brings the run of a round to its end, and raises what ends it before.
        tell: shows a line to the person.
    """

    def __init__(
        self,
        config: LoopConfig,
        generate: Callable[[RunConfig], None],
        tell: Callable[[str], None],
    ) -> None:
        self._config = config
        self._generate = generate
        self._tell = tell
        self._folder = config.out.absolute()
        self._model = models.locate(config.model)
        _check(config)
        if (self._folder / "run.sqlite").is_file():
            raise ConfigError(f"{config.out}: holds a run already; choose another --out")
        with cannot_write(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self._folder / "loop.lock")
        try:
            self.ledger = Ledger(self._folder)
            if self.ledger.start is not None:
                self.ledger.refuse_other(config.fixed())
        except BaseException:  # raised again, with the folder free
            self._lock.release()
            raise

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()

    def rounds(self) -> Iterator[Round]:
        """The rounds of the ledger, then those that are still wanted, each when it is finished.

        Raises WoolmillError; the same loop again goes on from there.
        """
        if self.ledger.start is None:
            self._begin()
        self._prune()
        yield from list(self.ledger.rounds)
        for number in range(len(self.ledger.rounds) + 1, self._config.rounds + 1):
            done = self._round(number)
            failpoint("loop.round")
            self.ledger.add(done)
            failpoint("loop.ledger")
            self._prune()
            yield done

    def model(self, number: int) -> str:
        """The model that round ``number`` made; 0: the first one.

        Its folder is called as the first one is, by whose name sampling has its defaults.
        """
        if number == 0:
            return self._model
        return str(self._round_folder(number) / "model" / Path(self._model).name)

    # -- steps ------------------------------------------------------------------------------------

    def _begin(self) -> None:
        config, people = self._config, self._folder / "people"
        if not people.is_dir():
            set_apart(config.seeds, config.held_out, people)
        failpoint("loop.people")
        self._tell(f"measuring {config.model} on {config.held_out} seed tasks that are held out")
        loss = self._losses(self._model, self._folder / "first", [people / HELD_OUT])[0]
        failpoint("loop.first")
        shown, held_out = (len(read_seeds(people / part)) for part in (SHOWN, HELD_OUT))
        self.ledger.begin(Start(settings=config.fixed(), shown=shown, held_out=held_out, loss=loss))
        self._tell(f"held-out loss before the first round: {loss:.4f}")

    def _round(self, number: int) -> Round:
        """The steps of one round, those that were done already aside; what it came to."""
        folder, kept = self._round_folder(number), self.ledger.kept
        before = kept.number if kept is not None else 0
        folder.mkdir(exist_ok=True)
        run = self._run_of(number, before)
        if not (folder / "data").is_dir():
            self._tell(f"round {number}: generating with {run.model or 'the host'}")
            self._generate(run)
            failpoint("loop.generated")
            self._export(run, folder / "data")
        failpoint("loop.exported")
        started_from = before if self._config.start == "kept" else 0
        if not Path(self.model(number)).is_dir():
            self._train(number, started_from)
        failpoint("loop.trained")
        for checkpoint in Path(self.model(number)).glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        own = folder / "data" / VALIDATION
        held_out = [self._folder / "people" / HELD_OUT, *([own] if own.is_file() else [])]
        loss, *own_loss = self._losses(self.model(number), folder / "loss", held_out)
        figures = figures_of(run.out, run.recipe)
        trained = _rows(folder / "data" / TRAIN)
        tokens = figures.completion_tokens
        return Round(
            number=number,
            started_from=started_from,
            accepted=figures.accepted,
            trained=trained,
            completion_tokens=tokens,
            per_1000_tokens=round(1000 * figures.accepted / tokens, 4) if tokens else None,
            refused=figures.refused,
            distinct_verbs=figures.distinct_verbs,
            nearest_rouge_l=figures.nearest_rouge_l,
            nearest_cosine=figures.nearest_cosine,
            loss_before=self.ledger.loss,
            loss=loss,
            own_loss=own_loss[0] if own_loss else None,
            kept=self._config.always or loss <= self.ledger.loss,
        )

    def _run_of(self, number: int, before: int) -> RunConfig:
        """The settings of a round's run: other draws than those before it, and rows that stay clear
        of the held-out tasks and of what was trained on already.
        """
        config = self._config.run()
        clear_of = [self._folder / "people" / HELD_OUT]
        clear_of += [path for each in self._kept() for path in self._data(each)]
        own: dict[str, Any] = {
            "out": self._round_folder(number) / "run",
            "seed": config.seed + number - 1,
            "against": [*config.against, *clear_of],
        }
        recipe = config.make_recipe([])
        if recipe.takes_seeds:
            own["seeds"] = self._folder / "people" / SHOWN
        if not any(stage.compares for stage in recipe.stages):
            del own["against"]
        if self._config.trains_itself:
            own["model"] = self.model(before) if before else self._config.model
        return self._config.run(**own)

    def _export(self, run: RunConfig, data: Path) -> None:
        with RunReader(run.out) as store:
            store.named_recipe = run.recipe
            options = Options(validation=self._config.validation or None, shard_rows=ONE_FILE)
            export_dataset(store, "messages", data, options)

    def _train(self, number: int, started_from: int) -> None:
        """Train into ``training``, which becomes the model's folder in one step."""
        folder = self._round_folder(number)
        training, finished = folder / "training", Path(self.model(number))
        numbers = [number] if self._config.start == "kept" else [*self._kept(), number]
        paths = [self._round_folder(each) / "data" / TRAIN for each in numbers]
        if self._config.with_seeds:
            paths.append(self._folder / "people" / SHOWN)
        paths = [path for path in paths if _rows(path)]
        if not paths:
            raise StoppedError(
                f"round {number} has no row to train on; woolmill report {folder / 'run'} says why"
            )
        self._tell(
            f"round {number}: training on {sum(map(_rows, paths)):,} rows; "
            f"watch {folder / 'training.log'}"
        )
        own = {
            "model_name_or_path": self.model(started_from),
            "data_path": paths,
            "output_dir": training,
            "resume": True,
        }
        self._trainer("trainer", own, folder / "training.log")
        failpoint("loop.finished")
        with cannot_write(folder):
            finished.parent.mkdir(exist_ok=True)
            training.rename(finished)

    def _losses(self, model: str, folder: Path, paths: list[Path]) -> list[float]:
        """The losses of ``model`` on files, measured once."""
        if not (folder / "loss.json").is_file():
            own = {"model_name_or_path": model, "data_path": paths, "output_dir": folder}
            self._trainer("trainer.evaluate", own, self._folder / "measuring.log")
        return losses(folder)

    def _trainer(self, program: str, own: dict[str, Any], log: Path) -> None:
        cache = self._folder / "cache"
        trainer(
            program,
            self._config.train,
            own,
            processes=self._config.processes,
            cache=cache,
            log=log,
        )
        shutil.rmtree(cache, ignore_errors=True)

    # -- the disk ---------------------------------------------------------------------------------

    def _prune(self) -> None:
        """Delete runs and models of rounds that ``keep`` does not cover; the model that the next
        round goes on from always stays, and so do datasets and figures, which are small.
        """
        done, kept = len(self.ledger.rounds), self.ledger.kept
        for each in self.ledger.rounds[: max(0, done - self._config.keep)]:
            folder = self._round_folder(each.number)
            gone = ["run"] if kept is not None and each.number == kept.number else ["run", "model"]
            for name in gone:
                with cannot_write(folder), suppress(FileNotFoundError):
                    shutil.rmtree(folder / name)
        failpoint("loop.pruned")

    def _round_folder(self, number: int) -> Path:
        return self._folder / f"round-{number}"

    def _kept(self) -> list[int]:
        return [each.number for each in self.ledger.rounds if each.kept]

    def _data(self, number: int) -> Iterator[Path]:
        """The rows of a round, those that validate included."""
        for name in (TRAIN, VALIDATION):
            if _rows(path := self._round_folder(number) / "data" / name):
                yield path


def _check(config: LoopConfig) -> None:
    """Raises ConfigError or InputError, before anything is made, for what would end a round."""
    recipe = config.run().make_recipe([])
    if config.validation and not any(stage.compares for stage in recipe.stages):
        raise ConfigError(
            f"--validation: the rows of recipe {recipe.name} are not compared, so none can be held"
            " out that no near-duplicate straddles; set it to 0"
        )
    if not (config.out / "people").is_dir():
        apart(read_seeds(config.seeds or bundled_seeds()), config.held_out)


def _rows(path: Path) -> int:
    """Lines of a dataset; 0 where there is none."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}") from error
