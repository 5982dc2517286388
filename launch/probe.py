"""`medfm probe`: held-out loss and few-shot probes of a kept checkpoint, or of each one that a run keeps."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from engine.errors import UserError

POLITE = 10  # niceness of a follower: where it shares cores with the run, the run goes first


def probe(args: argparse.Namespace) -> int:
    """`medfm probe CHECKPOINT DATA` or `medfm probe --follow RUN`."""
    from finetune.weights import device_of

    device_of(args.device)  # before anything is read
    if args.follow:
        return _follow(args)
    if not args.checkpoint:
        raise UserError("nothing to probe: name a CHECKPOINT, or a run with --follow RUN")
    checkpoint = Path(args.checkpoint)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such folder; give a run, a checkpoint or an exported encoder")
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: no such folder; make it first")
    folder = _whole_network(checkpoint)
    found = _probe_encoder(checkpoint, args) if folder is None else _probe_network(folder, args)
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot be written: {error.strerror}") from None
    return 0


def _follow(args: argparse.Namespace) -> int:
    run = Path(args.follow)
    if args.checkpoint or args.json or args.split:
        raise UserError(
            "--follow RUN takes no CHECKPOINT, DATA, --split or --json; its figures are in RUN/probe.jsonl"
        )
    if args.poll <= 0:
        raise UserError(f"--poll {args.poll:g}: give the seconds between two looks, above 0")
    if not (run / "attempt").is_file():
        raise UserError(f"{run}: not the folder of a run; start the run first, or give its --run folder")
    if (run / "recipe.yaml").is_file():
        _pretraining(run)
    from pretrain.follow import Follower

    os.nice(POLITE)
    follower = Follower(run, args.labelled or "", args.device)
    verdict = follower.follow(args.poll)
    end = f"the run is {verdict.state} at update {verdict.update}"
    message = f" ({verdict.message})" if verdict.message else ""
    print(f"{end}{message}; {follower.scored} checkpoints scored, all figures are in {run / 'probe.jsonl'}")
    return 0


def _whole_network(checkpoint: Path) -> Path | None:
    """The checkpoint folder that `checkpoint` means; None for weights of an encoder alone."""
    if (checkpoint / "complete.json").is_file():
        return checkpoint
    if not (checkpoint / "checkpoints").is_dir():
        return None
    from engine import checkpoint as stored
    from pretrain.stored import kept

    for folder in reversed(kept(checkpoint)):
        if not (fault := stored.fault(folder)):
            return folder
        print(f"damaged checkpoint left out: {folder}: {fault}")
    raise UserError(f"{checkpoint}: holds no good checkpoint yet")


def _probe_network(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    run = folder.resolve().parent.parent
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{folder}: its run's recipe.yaml is not at {run}; copy it there, or probe the run")
    _pretraining(run)
    import torch

    from data_pipeline.manifest import Manifest
    from engine.checkpoint import Checkpoint
    from pretrain.follow import with_labelled
    from pretrain.quality import Quality
    from pretrain.stored import Gone, read_network, recipe_of

    recipe = with_labelled(recipe_of(run), args.labelled or "", print)
    data = recipe.data.model_copy(update={"root": args.data or recipe.data.root})
    if args.split:
        data = data.model_copy(update={"held_out": args.split})
    manifest = Manifest.open(data.root)
    if Checkpoint(folder).state["segments"][-1]["data"].get("manifest") != manifest.hash[:16]:
        print(f"{data.root}: not the dataset of the run; all its sources are scored")
        data = data.model_copy(update={"sources": (), "exclude_sources": ()})
    if recipe.engine.threads:
        torch.set_num_threads(recipe.engine.threads)
    quality = Quality(recipe.model_copy(update={"data": data}), manifest)
    if quality.held_out is None and (args.split or quality.probe is None):
        splits = ", ".join(sorted(set(manifest.column("split"))))
        raise UserError(f"{data.root}: no samples in split {data.held_out!r}; it has {splits}: give --split")
    print(f"{folder}\n{quality.describe()}")
    try:
        scores = quality.score_alone(read_network(folder, recipe, torch.device(args.device)))
    except Gone:
        raise UserError(f"{folder}: was deleted while it was read; take a newer one") from None
    print(quality.report(scores, []))
    return {
        "checkpoint": os.fspath(folder), "data": data.root, "labelled": recipe.probes.data, "scores": scores,
    }  # fmt: skip


def _probe_encoder(checkpoint: Path, args: argparse.Namespace) -> dict[str, object]:
    import torch

    from model.weights import find_weights, load_encoder
    from pretrain.probe import Probe
    from pretrain.probe_config import ProbeConfig
    from pretrain.quality import probe_line

    find_weights(checkpoint)
    labelled = args.labelled or args.data
    if not labelled:
        raise UserError(f"{checkpoint}: name a labelled shard dataset to probe this encoder on")
    device = torch.device(args.device)
    encoder = load_encoder(checkpoint, device=device)
    probes = Probe(ProbeConfig(data=labelled), encoder.config)
    print(
        f"{checkpoint}\nheld out: left out, for an encoder alone reconstructs nothing: probe a checkpoint of "
        f"its run; probes at their defaults, in float32\n{probes.describe()}"
    )
    scores = probes.score(encoder, 0, 1, device)
    print(probe_line(scores))
    for line in probes.alarms(scores):
        print(f"ALARM: {line}")
    return {"checkpoint": os.fspath(checkpoint), "data": "", "labelled": labelled, "scores": scores}


def _pretraining(run: Path) -> None:
    """Refuse the run of another stage."""
    from launch.commands import stage_of

    if (stage := stage_of(os.fspath(run / "recipe.yaml"))) != "pretrain":
        raise UserError(f"{run}: a {stage} run; `medfm probe` takes pretraining runs")
