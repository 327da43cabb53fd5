"""``casehard select``: choose the safe rows worth training on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from casehard.cli import console, options
from casehard.cli.runs import new_folder
from casehard.errors import ConfigError
from casehard.io import secrets


def select(
    pool: Annotated[list[str], typer.Option("--pool", metavar="FILE", help="Safe rows to choose from. Repeatable.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make: safe.jsonl and selection.json.")],
    model: options.Model = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="FILE", help="The user's rows, as uploaded. Repeatable."),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option("--embedder", metavar="DIR|ID", help="Sentence-embedding model [default: the model itself]."),
    ] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Rows to pick [default: 3 % of the user's rows].")] = None,
    beta: Annotated[float | None, typer.Option(help="Exponent of relevance; 0 = diversity only.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="rd-dpp, random, matched-random, relevance, diversity, k-means or gradient."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option("--cache", metavar="DIR", help="Keep embeddings here, named by content.")
    ] = None,
    device: options.Device = None,
    maps: options.Maps = None,
    config: options.Config = None,
    sets: options.Sets = None,
    seed: options.Seed = None,
) -> None:
    """Choose the safe rows that are relevant to the user's data and unlike each other.

    Writes the chosen rows to DIR/safe.jsonl, in order, and how they were chosen to DIR/selection.json.
    """
    values = options.settings(config, sets, {"k": k, "beta": beta, "strategy": strategy})
    pool, data = options.mapped(pool, maps), options.mapped(data or [], maps)
    source = embedder or model
    if source is None:
        raise ConfigError(
            "--model is missing", hint="give the model to be tuned, or --embedder with an embedding model"
        )
    options.check_specs(pool, "--pool")
    options.check_specs(data, "--data")
    secrets.refuse(values, where="select")
    with new_folder(out):
        source = options.model_folder(source)
        _run(values, source, embedder is not None, pool, data, out, cache, seed or 0, device or "auto")


def _sentence_embedder(folder: Path, device: str) -> Any:
    from casehard.data.embed import load_embedder
    from casehard.model.check import check_folder
    from casehard.model.digest import folder_digest
    from casehard.model.headers import build_config

    config = build_config(folder, check_folder(folder).config)
    return load_embedder(folder, digest=folder_digest(folder), device=device, config=config)


def _run(
    values: dict[str, Any],
    source: str,
    sentence: bool,
    pool_specs: list[str],
    user_specs: list[str],
    out: Path,
    cache: Path | None,
    seed: int,
    device: str,
) -> None:
    import json

    from casehard.config import build
    from casehard.data import select as chooser
    from casehard.data.embed import Embedder
    from casehard.data.sources import load_many, save
    from casehard.io.files import staged
    from casehard.model.load import find_device, load

    settings = build(chooser.SelectConfig, values, where="select")
    pool, user = load_many(pool_specs), load_many(user_specs) if user_specs else []
    console.plan(
        f"choose {chooser.budget(settings, len(user))} of {len(pool)} safe rows by {settings.strategy}",
        {
            "embeddings": source,
            "pool": pool_specs,
            "data": user_specs,
            "beta": settings.beta,
            "device": options.device_text(device),
            "seed": seed,
            "out": out,
        },
    )
    if sentence:
        from casehard.model.source import find

        embedder = _sentence_embedder(find(source), str(find_device(device)))
    else:
        loaded = load(source, device=device)
        embedder = Embedder(loaded.net, loaded.tokenizer, loaded.digest)
    picks = chooser.select_examples(embedder, pool, user, config=settings, seed=seed, cache=cache)
    record = chooser.manifest(picks, pool, len(user), config=settings, embedder=embedder.digest, seed=seed)
    with staged(out) as folder:
        save(folder / "safe.jsonl", [pool[i] for i in picks.order])
        (folder / "selection.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rows: list[tuple[str, str]] = [("rows", f"{len(picks.order):,} of {len(pool):,}")]
    if picks.mean_relevance is not None:
        rows.append(("mean relevance", f"{picks.mean_relevance:.3f}"))
    rows.append(("log det of the cosine kernel", f"{picks.log_det:.1f}"))
    rows.append(("picks over directions (k/d)", f"{picks.per_direction:.2f} of {picks.directions}"))
    if record["refusals"]:
        rows.append(("refusals", "{picked} of {pool} in the pool".format(**record["refusals"])))
    rows += [(f"{tag} = {value}", f"{n}") for tag, counts in record["coverage"].items() for value, n in counts.items()]
    console.table("the chosen set", ["quantity", "value"], rows)
    console.made("safe rows", out / "safe.jsonl")
