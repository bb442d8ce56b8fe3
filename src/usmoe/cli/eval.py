"""`usmoe eval`: embeddings in mteb's tasks, or zero-shot language tasks, under any router."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from usmoe.cli import options
from usmoe.cli.options import AsJson, Debug, Device, Dtype, Offline, Seed
from usmoe.cli.views import print_view
from usmoe.report.whole import whole_text

if TYPE_CHECKING:
    from usmoe.evaluate.language import TaskScore
    from usmoe.evaluate.run import Score
    from usmoe.reproduce.view import View

_OF_RUNS = ("text", "split", "positions", "serve_k", "tokens", "segment", "memory", "edited", "cache")
_OF_EMBEDDINGS = ("embeddings", "prompts", "pooling", "moee", "w", "router_features", "instructions", "standardize")
_OF_EMBEDDINGS += ("max_length",)
_OF_LANGUAGE = ("scoring", "limit", "fewshot", "include")
_NOT_OF_RUNS = ("tasks", *_OF_EMBEDDINGS, "lm_eval", *_OF_LANGUAGE, "results", "quantize", "batch_size")


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help='A folder, a hub id, or "shipped".')],
    tasks: Annotated[
        list[str] | None,
        typer.Option(help='Tasks of mteb, or of your own under --data, with commas between; "paper": its nineteen.'),
    ] = None,
    routers: Annotated[
        list[str],
        typer.Option(
            help='With commas between: own, saved, expert_choice, "usmoe(alpha=0.5)", module:name, a tune .json.'
        ),
    ] = ["own"],  # noqa: B006
    embeddings: Annotated[list[str], typer.Option(help="hidden, router, moee.")] = ["hidden"],  # noqa: B006
    prompts: Annotated[
        list[str], typer.Option(help="none, prompteol, ... by name, or (one an option) a template with {text}.")
    ] = ["none"],  # noqa: B006
    pooling: Annotated[str, typer.Option(help="last, mean or weighted_mean, over the tokens.")] = "last",
    moee: Annotated[str, typer.Option(help="concat, or sum (of two cosines).")] = "concat",
    w: Annotated[float, typer.Option("--w", help="Weight of the routers' cosine in the sum.")] = 1.0,
    router_features: Annotated[str, typer.Option(help="logits or probabilities.")] = "logits",
    instructions: Annotated[
        bool, typer.Option("--instructions", help="Put each task's instruction before its texts, as MoEE does.")
    ] = False,
    standardize: Annotated[
        str | None, typer.Option(help='By the statistics of a sample: "novels", or a file with a text a line.')
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of prompt and text, at most.", min=1)] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option("--lm-eval", help="Tasks of lm-eval, such as arc_challenge, with commas between."),
    ] = None,
    scoring: Annotated[
        str, typer.Option(help="Of --lm-eval: honest (each token from those before it alone) or teacher-forced.")
    ] = "honest",
    limit: Annotated[int | None, typer.Option(help="Of --lm-eval: samples a task, at most.", min=1)] = None,
    fewshot: Annotated[int, typer.Option(help="Of --lm-eval: solved examples before each question.", min=0)] = 0,
    include: Annotated[Path | None, typer.Option(help="Of --lm-eval: a folder of task files of your own.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Of a run of usmoe train: another text than its own test split.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a run: test, validation or train.")] = "test",
    positions: Annotated[int, typer.Option(help="Of a run: sampled for the honest figure.", min=1)] = 200,
    serve_k: Annotated[
        float | None, typer.Option("--serve-k", help="Of a run: serve it by a threshold at so many experts, too.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Of a run: of the split, from its beginning.", min=2)] = None,
    segment: Annotated[
        int | None, typer.Option(help="Of a run: tokens predicted at once; without it as it was evaluated.", min=1)
    ] = None,
    memory: Annotated[
        int | None, typer.Option(help="Of a run: tokens remembered; without it as it was evaluated.", min=0)
    ] = None,
    edited: Annotated[
        bool,
        typer.Option("--edited", help="Of a run: read it although the source of its router of one's own was edited."),
    ] = False,
    cache: Annotated[Path, typer.Option(help="Of a run: where usmoe train keeps prepared corpora.")] = Path(
        "usmoe-runs/.corpora"
    ),
    data: Annotated[
        Path | None, typer.Option(help="A folder of local data sets, in the hub's columns, in place of the hub.")
    ] = None,
    results: Annotated[
        Path, typer.Option(help="The folder for results, and for what a run that was stopped had finished.")
    ] = Path("usmoe-results"),
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown.")] = None,
    quantize: Annotated[str | None, typer.Option(help="Experts in 4 bits: nf4 or fp4.")] = None,
    batch_size: Annotated[int, typer.Option(help="Texts in a batch.", min=1)] = 32,
    force: Annotated[
        bool, typer.Option("--force", help="Compute again what is kept, and overwrite the Markdown file.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    offline: Offline = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score a model's embeddings with mteb, or the model itself with lm-eval, under one router or several; or a run of
    usmoe train by how well it predicts its test split: teacher-forced, honest, and served by causal routers.

    Without --routers a model is read under the routers that it was saved with (saved), or else by its own choice (own).
    A run is always read by its own router, and by every other one in --routers, too. --dtype other than float32 reads
    it under autocast, as runs of that precision are trained.

    Every router is taken with every prompt and every embedding. What is finished is kept in --results: the same command
    goes on where it was stopped. For the paper's models the paper's figures stand under ours.

    Examples: usmoe eval shipped --tasks STS12,STSBenchmark --routers "own,usmoe(alpha=0.5)" --embeddings hidden,moee
    --data DIR; usmoe eval allenai/OLMoE-1B-7B-0924 --lm-eval arc_challenge; usmoe eval usmoe-runs/book
    """
    from usmoe.cli.likelihood import is_run

    if is_run(Path(model)):
        own = "of the run's own corpus"
        options.refuse_unread(
            context,
            (True, _NOT_OF_RUNS, f"of mteb and lm-eval, and {model} is a run"),
            (text is not None, ("split",), f"{own}, and --text is another"),
            (text is not None and serve_k is None, ("data", "cache"), f"{own}, of which --text reads nothing"),
            (markdown is None, ("force",), "for the file of --markdown, which is not given"),
        )
        page = options.output_path(markdown, force, "--markdown")
        said = dict(text=text, split=split, positions=positions, k=serve_k, tokens=tokens, segment=segment)
        said |= dict(edited=edited, memory=memory, routers=options.listed(routers), data=data, cache=cache)
        _of_run(Path(model), page, as_json, said | dict(seed=seed, device=device, dtype=dtype, offline=offline))
        return
    named, language = options.listed(tasks or ()), options.listed(lm_eval or ())
    options.refuse_unread(context, (True, _OF_RUNS, f"of runs, and {model} is none"))
    if not named and not language:
        raise typer.BadParameter(
            "Give --tasks, such as STS12 or paper, or --lm-eval, such as arc_challenge; or the folder of a run"
        )
    from usmoe.cli.routers import saved_with
    from usmoe.embed.settings import unread

    kinds = options.listed(embeddings)
    nowhere = set.intersection(*(set(unread(one, moee)) for one in kinds)) if kinds else set()
    options.refuse_unread(
        context,
        (
            not language,
            _OF_LANGUAGE,
            "not read: --scoring, --limit, --fewshot and --include belong to --lm-eval, which is not given",
        ),
        (not named, _OF_EMBEDDINGS, "not read: Options of embeddings belong to --tasks, which is not given"),
        (True, sorted(nowhere - {"layers"}), f"not read under --embeddings {','.join(kinds)} and --moee {moee}"),
    )
    from usmoe.reproduce import views
    from usmoe.reproduce.view import as_markdown

    page = options.output_path(markdown, force, "--markdown")
    options.work_folder(results, "--results")
    if data is not None and not data.is_dir():
        raise ValueError(f"There is no folder {data}. Give one with local data sets, or leave --data out for the hub.")
    if offline:  # read where these libraries are imported, below
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    routers = options.listed(routers)
    saved = saved_with(model, offline, "as --routers saved; own is the model's own choice")
    if saved and not options.was_typed(context, "routers"):
        routers = ["saved"]
    shared: dict[str, Any] = dict(
        results=results, data=data, batch_size=batch_size, seed=seed, device=device, dtype=dtype, offline=offline
    )
    said: dict[str, Any] = {"model": model}
    shown: list[View] = []
    if named:
        from usmoe.evaluate.run import evaluate as run
        from usmoe.evaluate.setting import grid

        _warn(routers, saved)
        settings = grid(
            routers,
            options.listed(embeddings),
            [name for one in prompts for name in ([one] if "{text}" in one else options.listed([one]))],
            pooling=pooling,
            moee=moee,
            w=w,
            features=router_features,
            instruction=instructions,
            standardize=standardize,
            max_length=max_length,
        )
        found = run(model, named, settings, quantize=quantize, anew=force, done=_tell, **shared)
        said["scores"] = [one.to_dict() for one in found]
        shown += views.embedding_views(found, model)
    if language:
        scored = _language(
            model,
            language,
            routers,
            options=dict(scoring=scoring, limit=limit, num_fewshot=fewshot, include=include, anew=force),
            quantize=quantize,
            **shared,
        )
        said["language"] = {router: [one.to_dict() for one in ones] for router, ones in scored.items()}
        shown.append(views.language_view(scored, model))
    try:  # a pipe that was closed costs no file
        if as_json:
            options.write_json(said)
        else:
            for view in shown:
                print_view(view)
    finally:
        if page is not None:
            whole_text("\n".join(map(as_markdown, shown)), page)


def _of_run(folder: Path, page: Path | None, as_json: bool, said: dict[str, Any]) -> None:
    """said: how to read it, as `figures_of_run` has it."""
    from usmoe.cli.likelihood import figures_of_run, view_of
    from usmoe.reproduce.view import as_markdown

    figures = figures_of_run(folder, **said)
    view = view_of(figures, folder, said["dtype"])
    try:  # what took minutes is shown, whatever becomes of the file; a pipe that was closed costs no file
        if as_json:
            options.write_json(figures.to_dict() | {"dtype": said["dtype"]})
        else:
            print_view(view)
    finally:
        if page is not None:
            whole_text(as_markdown(view), page)


def _tell(score: Score) -> None:
    sys.stderr.write(f"{score.task}  {score.setting.label}: {100 * score.score:.2f}\n")


def _warn(routers: Sequence[str], saved: Mapping[str, str]) -> None:
    """Say of which routers a vector depends on more than its text."""
    from usmoe.evaluate.run import router_of
    from usmoe.hf.saved import CODE
    from usmoe.routing.text import parse_router
    from usmoe.types import SAY_SO, makes_promises, promises_of

    for text in routers:
        router = router_of(text, bool(saved))
        if text == "saved":  # as text: what cannot be read so is refused where the model is loaded
            router = {name: parse_router(one) for name, one in saved.items() if not one.endswith(CODE)}
        several = list(router.values()) if isinstance(router, dict) else [] if router is None else [router]
        if not all(promises_of(one).batch_independent and promises_of(one).padding_independent for one in several):
            said = f"Under {text} a vector depends on who is in its batch, so scores depend on --batch-size."
            if not all(map(makes_promises, several)):
                said = f"{text} does not promise that a vector depends on its text alone. {SAY_SO}"
            sys.stderr.write(f"{said}\n")


def _language(
    model: str | None,
    names: Sequence[str],
    routers: Sequence[str],
    *,
    options: dict[str, Any],
    quantize: str | None,
    results: Path,
    data: Path | None,
    batch_size: int,
    seed: int,
    device: str,
    dtype: str,
    offline: bool,
) -> dict[str, list[TaskScore]]:
    """{router: scores in lm-eval's tasks} of one model."""
    from usmoe.embed.digest import digest
    from usmoe.evaluate.language_runs import compare_routers
    from usmoe.evaluate.run import router_of
    from usmoe.hf.load import load, saved_with
    from usmoe.hf.packed import quantize_experts

    saved = saved_with(model, offline=offline)
    chosen = {text: router_of(text, bool(saved)) for text in routers}
    loaded, tokenizer = load(model, dtype=dtype, device=device, offline=offline)
    if quantize is not None:
        quantize_experts(loaded, quantize)  # pyright: ignore[reportArgumentType]
    return compare_routers(
        loaded,
        tokenizer,
        chosen,
        names,
        results=results / "language",
        model_digest=f"{digest(loaded, tokenizer)} {quantize or dtype}",
        data=data,
        batch_size=batch_size,
        seed=seed,
        done=_tell_language,
        **options,
    )


def _tell_language(router: str, scores: Sequence[TaskScore]) -> None:
    for one in scores:
        sys.stderr.write(f"{one.task}  {router}: {one.metric} {one.value:.4f}\n")
