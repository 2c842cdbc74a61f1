"""The stages ``respond`` and ``judge``: all models answer the questions of the data, and the best answers are kept."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from fusekit import artifacts as artifact
from fusekit.artifacts import Inputs
from fusekit.capturing.models import Checkpoint, ModelChoice, find_checkpoint
from fusekit.data.prepare import prepare
from fusekit.devices import Need, progress, refuse_lacking
from fusekit.disk import append, commit_file, counted, sweep
from fusekit.errors import CaptureError, FusekitError, RecipeError, StorageError
from fusekit.hub import is_repository
from fusekit.layout import PIVOT, WORK, Layout
from fusekit.pipeline.capturing import captured, check_store_place, store_facts, store_status
from fusekit.pipeline.plan import Planner
from fusekit.pipeline.stage import (
    BEGUN,
    DONE,
    STALE,
    Context,
    Stage,
    Status,
    Step,
    compared,
    made_from,
    read_rows_file,
    write_json,
    write_rows,
)
from fusekit.recipe import Recipe
from fusekit.settings import Judge, RespondSettings
from fusekit.types import Row
from fusekit.yaml import Mistake

ANSWERS, VOTES, COUNTS = "answers.jsonl", "votes.jsonl", "counts.json"
_LOADED = ("dtype", "quantization", "attn_implementation")
_OF_MODEL = {"model", "model_fingerprint", "tokenizer", *(f"details.{name}" for name in _LOADED)}


def _made_lines(
    context: Context,
    path: Path,
    inputs: Inputs,
    items: Sequence[Any],
    how: Callable[[Sequence[Any]], list[Any]],
    *,
    label: str,
) -> list[Any]:
    """A JSON value for each item, a line of a file that grows until it becomes an artifact; what is there stays.

    inputs: what they are made from, compared by the caller. how: makes values, one for each item.
    """
    artifact.begin(path.parent, inputs)
    sweep(path.parent)
    found, size = _lines_of(path) if path.is_file() else [], _section(context).prompts_per_shard
    if len(found) < len(items):
        del found[len(found) // size * size :]  # so that batches are those of an uninterrupted run
    commit_file(path, b"".join(map(_line, found)))
    with progress(len(items), label, "question", quiet=context.quiet) as bar:
        bar.update(len(found))
        for start in range(len(found), len(items), size):
            records = how(items[start : start + size])
            append(path, b"".join(map(_line, records)))
            found += records
            bar.update(len(records))
    return found


def _lines_of(path: Path) -> list[Any]:
    """The values of a file's lines, without one that was cut off."""
    try:
        return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged: {error}; remove it, and it is made again") from error


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _status(context: Context, stage: str, folder: Path, inputs: Callable[[Inputs], Inputs], makers: int = 1) -> Status:
    """The status of an artifact that grows line by line. inputs: given the former ones, those that are known now."""

    def now(before: Inputs) -> Inputs:
        return before | inputs(before)

    known, work = made_from(folder, stage), Layout.work(folder)
    if known is not None or (begun := artifact.begun(work)) is None:
        return compared(folder, known, now)
    status = compared(work, begun, now)
    if status.state == STALE:
        return status
    total = len(_questions(context)) * makers
    done = sum(path.read_bytes().count(b"\n") for path in work.glob("*.jsonl"))
    return Status(folder, BEGUN, note=f"{done} of {counted(total, 'question')} done", left=total - done)


def _section(context: Context) -> RespondSettings:
    assert context.recipe.respond is not None
    return context.recipe.respond


def _questions(context: Context) -> list[Any]:
    from fusekit.generation.respond import questions_of

    found = questions_of(context.rows)
    if not found:
        raise RecipeError(
            "respond: no example of the data ends with an answer of the assistant, so there is no question"
        )
    return found


class Respond(Stage):
    """The answers of every model to the questions of the data, where the recipe asks for some."""

    name = "respond"
    places = ("responses/",)
    needs = ("data",)

    def artifacts(self, context: Context) -> dict[str, Path]:
        if context.recipe.respond is None:
            return {}
        return {name: context.layout.responses(name) for name in context.names}

    def inputs(self, context: Context, name: str, before: Inputs) -> Inputs:
        section, facts = _section(context), store_facts(context, name, before, thorough=True)
        sampled = section.model_dump(exclude={"judges"} | ({"top_p", "seed"} if not section.temperature else set()))
        return {
            **{key: value for key, value in facts.items() if key in _OF_MODEL},
            **sampled,
            "questions": artifact.joined_hash(Row(question.messages).key for question in _questions(context)),
        }

    def status(self, context: Context, name: str) -> Status:
        return _status(context, self.name, context.layout.responses(name), partial(self.inputs, context, name))

    def make_one(self, context: Context, name: str) -> None:
        """Let a model answer the questions, or what is missing of them."""
        from fusekit.capturing.models import load_model
        from fusekit.capturing.teacher import memory_needs
        from fusekit.generation.respond import respond

        section, folder, started = _section(context), context.layout.responses(name), time.monotonic()
        questions, inputs, checkpoint = _questions(context), self.inputs(context, name, {}), context.checkpoint(name)

        @cache
        def model() -> Any:
            if not context.ignore_estimates:
                needs = memory_needs(checkpoint, context.recipe.capture, context.processes)
                way_out = "Free some, or load the model smaller (load.dtype); --ignore-estimates starts it all the same"
                refuse_lacking(needs, f"{name} does not fit to write answers:", way_out, CaptureError)
            checkpoint.fetch(bar=not context.quiet)
            return load_model(checkpoint, context.processes.device)

        def answer(some: Sequence[Any]) -> list[Any]:
            return [list(answer) for answer in respond(model(), context.reader(name), some, section)]

        answers = _made_lines(
            context, Layout.work(folder) / ANSWERS, inputs, questions, answer, label=f"{name} answers"
        )

        def write(into: Path) -> None:
            with (into / ANSWERS).open("w", encoding="utf-8", newline="\n") as file:
                for question, (text, finish) in zip(questions, answers, strict=True):
                    record = {"question": Row(question.messages).key, "text": text, "finish": finish}
                    file.write(json.dumps(record) + "\n")

        artifact.publish(folder, Respond.name, inputs, write, context.made(started))
        shutil.rmtree(Layout.work(folder))
        finishes = Counter(finish for _, finish in answers)
        said = ", ".join(f"{number} {finish}" for finish, number in finishes.most_common())
        context.say(f"respond {name}: {counted(len(answers), 'answer')} ({said})")

    def can_compare(self, planner: Planner, name: str) -> bool:
        return planner.done("data") and name in planner.models

    def estimate(self, planner: Planner, step: Step) -> list[Need]:
        step.rows = step.rows if step.rows is not None else planner.rows.rows
        return []


class Judging(Stage):
    """The votes, and a store of every model over the winners' answers: of the pivot over all, else over its own."""

    name = "judge"
    places = ("judged", f"judged{WORK}", "winners/")
    needs = ("data", "respond")
    shared = True

    def artifacts(self, context: Context) -> dict[str, Path]:
        if context.recipe.respond is None:
            return {}
        winners = {f"answers of {name}": context.layout.winners(name) for name in context.names}
        return {"votes": context.layout.judged} | winners

    def check_place(self, context: Context, name: str) -> None:
        folder = self.artifacts(context)[name]
        artifact.refuse_occupied(folder, self.name) if name == "votes" else check_store_place(folder)

    def inputs(self, context: Context, _name: str, before: Inputs) -> Inputs:
        """Of the votes."""
        section = _section(context)
        facts: Inputs = {}
        for judge in section.judges:
            facts |= {f"judges.{judge.label}.{key}": value for key, value in judge.model_dump(exclude={"name"}).items()}
            if judge.reward_model is not None:
                key = f"judges.{judge.label}.fingerprint"
                try:
                    _checkpoint(context, judge)
                    facts[key] = context.fingerprint(_label(judge))
                except CaptureError:
                    if key not in before:
                        raise
                    facts[key] = before[key]  # it has served, and may be gone
        facts |= {"order": [judge.label for judge in section.judges]}
        facts |= section.model_dump(include={"batch_size", "prompts_per_shard"})
        facts |= {f"data.{key}": getattr(context.recipe.data, key) for key in ("max_length", "overlong", "train_on")}
        for name, folder in Respond().artifacts(context).items():
            known = artifact.read(folder)
            if known is None:
                raise StorageError(f"{folder} is missing: the stage `respond` comes first")
            facts[f"answers.{name}"] = known.files[ANSWERS].xxh3
            facts[f"readers.{name}"] = context.reader(name).fingerprint
        return facts

    def status(self, context: Context, name: str) -> Status:
        judges = len(_section(context).judges)
        votes = _status(context, self.name, context.layout.judged, partial(self.inputs, context, name), judges)
        if name == "votes":
            return votes
        model, store = name.removeprefix("answers of "), self.artifacts(context)[name]
        if votes.state != DONE:
            return Status(store)
        rows = _rows_of(model, *winners_of(context))
        return store_status(context, model, store, rows) if rows else Status(store, DONE, note="it won no question")

    def make(self, context: Context) -> None:
        """Judge the answers, and capture what the winners say about their own."""
        if context.recipe.respond is None:
            return
        in_first = context.processes.first_then_all
        if not in_first(lambda: self.status(context, "votes").is_done()):
            _judge(context, in_first(lambda: self.inputs(context, "votes", {})))
        won = winners_of(context)
        for name in context.names:
            if rows := _rows_of(name, *won):
                captured(context, name, rows, context.layout.winners(name), context.recipe.capture)

    def mistakes(self, recipe: Recipe, layout: Layout | None = None) -> list[Mistake]:
        """Judges that cannot be found; none where the votes are there."""
        from fusekit.generation.respond import called

        if recipe.respond is None or (layout is not None and (layout.judged / artifact.MANIFEST).is_file()):
            return []
        found = []
        for index, judge in enumerate(recipe.respond.judges):
            at = ("respond", "judges", index)
            try:
                if judge.reward_model is not None and not is_repository(judge.reward_model):
                    find_checkpoint(_choice(judge), download=False)
                elif judge.python is not None:
                    called(judge.python)
            except FusekitError as error:
                found.append(Mistake(str(error), at))
        return found


def _choice(judge: Judge) -> ModelChoice:
    how = judge.model_dump(include={"dtype", "revision", "trust_remote_code", "allow_pickle"})
    return ModelChoice(str(judge.reward_model), **how)


def _checkpoint(context: Context, judge: Judge) -> Checkpoint:
    return context.checkpoint(_label(judge), _choice(judge))


def _label(judge: Judge) -> str:
    return f"judges/{judge.label}"  # a source's name has no slash


def winners_of(context: Context) -> tuple[list[Row], dict[str, str]]:
    """The winners' answers as prepared examples, and by their keys who wrote them. Raises StorageError."""
    folder = context.layout.judged
    rows, path = read_rows_file(folder), folder / VOTES
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        writers = {record["row"]: str(record["winner"]) for record in records if record["winner"] is not None}
        return rows, {row.key: writers[row.key] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} is damaged: {error!r}; remove {folder} and run again") from error


def _rows_of(name: str, rows: Sequence[Row], writers: Mapping[str, str]) -> list[Row]:
    """The winners' answers that a model is captured over."""
    return [row for row in rows if name in (PIVOT, writers[row.key])]


def _judge(context: Context, inputs: Inputs) -> None:
    started, in_first = time.monotonic(), context.processes.first_then_all
    questions, data = _questions(context), context.recipe.data
    written: list[dict[str, Row]] = [{} for _ in questions]
    for name, place in Respond().artifacts(context).items():
        artifact.require_whole(place)
        for number, line in enumerate((place / ANSWERS).read_text(encoding="utf-8").splitlines()):
            answer = json.loads(line)
            if answer["text"].strip():
                written[number][name] = questions[number].answered(answer["text"], whole=answer["finish"] == "end")
    readers = [context.reader(name) for name in context.names]
    prepared = prepare((row for of in written for row in of.values()), readers, data.max_length, data.overlong)
    rows = {row.key: row for row in prepared.rows}
    written = [{name: rows[row.key] for name, row in of.items() if row.key in rows} for of in written]
    asked = list(zip(questions, written, strict=True))
    scores: dict[str, list[dict[str, float]]] = {}
    for judge in _section(context).judges:
        if judge.bits_per_byte:
            scores[judge.label] = _bits(context, list(rows.values()), written)
        else:
            scores[judge.label] = in_first(partial(_scores, context, judge, inputs, asked))
    in_first(lambda: _publish(context, inputs, asked, scores, started))


def _scores(
    context: Context, judge: Judge, inputs: Inputs, asked: Sequence[tuple[Any, Mapping[str, Row]]]
) -> list[dict[str, float]]:
    """The scores of a judge, who is loaded only where something is missing of them."""
    from fusekit.generation.respond import scorer_of

    section = _section(context)

    @cache
    def scorer() -> Any:
        checkpoint = _checkpoint(context, judge) if judge.reward_model is not None else None
        if checkpoint is not None:
            checkpoint.fetch(bar=not context.quiet)
        return scorer_of(judge, checkpoint, context.processes.device, section.batch_size)

    def score(some: Sequence[Any]) -> list[Any]:
        scores: list[Any] = scorer()([question for question, _ in some], [of for _, of in some])
        return scores

    path = Layout.work(context.layout.judged) / f"judge-{section.judges.index(judge)}.jsonl"
    items = [(question, {name: row.messages[-1].content for name, row in of.items()}) for question, of in asked]
    return _made_lines(context, path, inputs, items, score, label=f"judge {judge.label}")


def _bits(context: Context, rows: Sequence[Row], written: Sequence[Mapping[str, Row]]) -> list[dict[str, float]]:
    """Minus the bits per byte of each answer, the mean over the models that did not write it."""
    how = context.recipe.capture.model_copy(update={"top_k": 1, "keep_mass": 1.0, "temperature": 1.0})
    bits: dict[str, dict[str, float]] = {}
    for name in context.names:
        store = captured(context, name, rows, Layout.work(context.layout.judged) / name, how)
        known = store.summary.cross_entropy / (np.maximum(store.summary.bytes, 1) * np.log(2.0))
        bits[name] = dict(zip(store.keys, known.tolist(), strict=True))

    def mean(writer: str, key: str) -> float | None:
        others = [known[key] for name, known in bits.items() if name != writer and key in known]
        return -sum(others) / len(others) if others else None

    judged = [{name: mean(name, row.key) for name, row in of.items()} for of in written]
    return [{name: score for name, score in of.items() if score is not None} for of in judged]


def _publish(
    context: Context,
    inputs: Inputs,
    asked: Sequence[tuple[Any, Mapping[str, Row]]],
    scores: Mapping[str, Sequence[Mapping[str, float]]],
    started: float,
) -> None:
    from fusekit.generation.respond import votes_of, winner_of

    folder = context.layout.judged
    votes: dict[str, Counter[str]] = {judge: Counter() for judge in scores}
    won: Counter[str] = Counter()
    best: dict[str, Row] = {}
    records = []
    for number, (question, of) in enumerate(asked):
        given = {judge: known[number] for judge, known in scores.items()}
        winner = winner_of(list(given.values()))
        for judge, known in given.items():
            votes[judge].update(votes_of(known))
        won[winner or "nobody"] += 1
        row = of[winner] if winner is not None else None
        if row is not None:
            best.setdefault(row.key, row)
        record = {"question": Row(question.messages).key, "dataset": question.dataset, "scores": given}
        records.append(record | {"winner": winner, "row": row.key if row is not None else None})
    if not best:
        raise RecipeError(f"judge: no answer to any of {len(asked)} questions got a vote, so nothing can be learned")

    def write(into: Path) -> None:
        write_rows(into, best.values())
        (into / VOTES).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        names = [*context.names, "nobody"]
        counts = {judge: {name: known[name] for name in names[:-1]} for judge, known in votes.items()}
        write_json(into / COUNTS, {"votes": counts, "won": {name: won[name] for name in names}})

    artifact.publish(folder, Judging.name, inputs, write, context.made(started))
    shutil.rmtree(Layout.work(folder), ignore_errors=True)
    context.say(f"judge: {', '.join(f'{name} {number}' for name, number in won.most_common())}")
