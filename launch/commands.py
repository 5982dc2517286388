"""What each command of `medfm` does: read its words, call the room that does the work, say what came out."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from engine.errors import UserError

FAILED = 3
STOPPED = 75
Frame = Literal["index", "ras", "lps"]


def run(args: argparse.Namespace, extra: Sequence[str]) -> int:
    """Run the parsed command; `extra` are recipe or source fields. Returns the exit code."""
    if args.command == "shards":
        from data_pipeline.shard_reader import DamagedSample

        actions = {"build": build, "merge": merge, "verify": verify, "inspect": inspect, "order": order}
        try:
            return actions[args.action](args, extra)
        except DamagedSample as error:
            print(f"medfm: error: {error}; `medfm shards verify` lists every fault", file=sys.stderr)
            return FAILED
    commands = {
        "pretrain": train,
        "finetune": train,
        "launch": train,
        "segment": segment,
        "evaluate": evaluate,
        "export": export,
    }
    return commands[args.command](args, extra)


def numbers(text: str, count: int | Sequence[int], option: str) -> tuple[float, ...]:
    """`-12.5,3,4` as floats; a wrong count or a word is an error for people."""
    counts = (count,) if isinstance(count, int) else tuple(count)
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in counts:
        wanted = " or ".join(map(str, counts))
        raise UserError(f"{option} {text}: give {wanted} numbers with commas between and no spaces")
    return values


def build(args: argparse.Namespace, _: Sequence[str]) -> int:
    """`medfm shards build SRC... --out DIR`."""
    from data_pipeline.build import build as build_shards
    from data_pipeline.build_recipe import read_recipe

    changes: dict[str, Any] = {
        name: getattr(args, name) for name in ("seed", "shard_samples") if getattr(args, name) is not None
    }
    if args.exact:
        changes["exact"] = True
    if args.split:
        changes["split"] = dict(zip(("train", "val", "test"), numbers(args.split, 3, "--split"), strict=True))
    for name in ("modality", "layout", "burned_in", "deface", "field_mm", "label_origin"):
        changes[name] = getattr(args, name)
    if args.spacing:
        changes["spacing"] = spacing_of(args.spacing)
    sources = list(args.sources)  # text: `Path` would spoil an address like s3://bucket
    recipes = [place for place in sources if place.lower().endswith((".yaml", ".yml"))]
    if recipes and len(sources) > 1:
        raise UserError(f"{recipes[0]}: give one YAML file, which lists every source, or folders and tables")
    recipe = read_recipe(sources[0] if recipes else sources, Path(args.root) if args.root else None, changes)
    _hear_sigterm()
    report = build_shards(
        recipe.sources, args.out, Path(args.private) if args.private else None, workers=_workers(args),
        scheduler=args.scheduler, part=part_of(args.part), work=Path(args.work) if args.work else None,
        exact=recipe.exact, seed=recipe.seed, split=recipe.split, shard_samples=recipe.shard_samples,
        level_min_voxels=recipe.level_min_voxels, on_leak=recipe.on_leak, drop_missing=args.drop_missing,
        retry=args.retry,
    )  # fmt: skip
    print(report.text())
    return 0


def merge(args: argparse.Namespace, _: Sequence[str]) -> int:
    """`medfm shards merge [WORK...] --out DIR`."""
    from data_pipeline.merge import merge as merge_parts

    _hear_sigterm()
    report = merge_parts(
        args.out, [Path(part) for part in args.parts], Path(args.private) if args.private else None,
        workers=_workers(args), scheduler=args.scheduler,
    )  # fmt: skip
    print(report.text())
    return 0


def _hear_sigterm() -> None:
    """SIGTERM, as of a batch system, ends a build in order, its workers too."""

    def stop(*_: object) -> None:
        print("medfm: stopped; start the same command again to go on", file=sys.stderr)
        raise SystemExit(STOPPED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def part_of(text: str | None) -> tuple[int, int] | None:
    """`--part 3/16` as (3, 16)."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None:
        raise UserError(f"--part {text}: give I/N, as 3/16")
    return int(found.group(1)), int(found.group(2))


def _workers(args: argparse.Namespace) -> int:
    """Processes asked for; by default one for each core that this process may use."""
    if args.workers is not None:
        if args.workers < 0:
            raise UserError(f"--workers {args.workers}: give 0 or more")
        return int(args.workers)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spacing_of(text: str) -> tuple[float, float, float]:
    """`--spacing`: one number for all axes, y,x of a picture, or z,y,x; mm."""
    given = numbers(text, (1, 2, 3), "--spacing")
    z, y, x = given * 3 if len(given) == 1 else (1.0, *given) if len(given) == 2 else given
    return z, y, x


def verify(args: argparse.Namespace, _: Sequence[str]) -> int:
    """`medfm shards verify DIR`: 0 when every byte is as written, else 3."""
    from data_pipeline.verify import verify as verify_shards

    damages = verify_shards(
        args.data, lambda done, total: print(f"\rshard {done}/{total}", end="", flush=True)
    )
    print()
    for damage in damages:
        print(damage, file=sys.stderr)
    print(f"{args.data}: {len(damages)} damaged" if damages else f"{args.data}: every byte is as written")
    return FAILED if damages else 0


def inspect(args: argparse.Namespace, _: Sequence[str]) -> int:
    """`medfm shards inspect DIR [--key KEY] [--picture FILE.png]`."""
    from data_pipeline.inspect import inspect as inspect_sample
    from data_pipeline.manifest import Manifest

    manifest = Manifest.open(args.data)
    print(f"{args.data}: {len(manifest)} samples, manifest {manifest.hash[:12]}")
    shown = inspect_sample(args.data, args.key)
    print(shown.text())
    if args.picture:
        Path(args.picture).write_bytes(shown.png)
        print(f"picture: {args.picture}")
    return 0


def order(args: argparse.Namespace, _: Sequence[str]) -> int:
    """`medfm shards order DIR`: what a batch holds, rounding, repeats; the first draws or a simulated run."""
    from data_pipeline.manifest import Manifest
    from data_pipeline.order import Order, lanes_of
    from data_pipeline.simulate import Cache, simulate
    from data_pipeline.simulation_page import page
    from engine.recipe import load_recipe
    from pretrain.recipe import PretrainRecipe
    from pretrain.selection import select_rows

    recipe = load_recipe(args.recipe or args.recipe_file, [], PretrainRecipe)
    manifest = Manifest.open(args.data)
    data = recipe.data.model_copy(update={"root": args.data})
    rows = select_rows(manifest, data, data.split)
    drawn = Order(manifest, rows, recipe.tokens, recipe.mixture, recipe.engine.seed)
    if args.simulate is not None:
        simulation = simulate(
            manifest,
            drawn,
            nodes=args.nodes,
            ranks_per_node=args.ranks_per_node,
            cache=Cache.parse(args.cache),
            updates=args.simulate or None,
        )
        if args.json:
            try:
                Path(args.json).write_text(json.dumps(asdict(simulation), indent=1) + "\n", encoding="utf-8")
            except OSError as error:
                raise UserError(f"--json {args.json}: cannot be written: {error.strerror}") from None
        print(page(drawn, simulation))
        return 0
    print(drawn.describe())
    for update in range(args.updates):
        for rank in range(args.processes):
            for group in lanes_of(rank, args.processes, recipe.mixture.groups):
                for draw in drawn.group_draws(update, group) if group is not None else ():
                    box = f"level {draw.level} origin {tuple(draw.origin)} extent {tuple(draw.extent)}"
                    key = manifest.value(draw.row, "key")
                    print(f"update {update} rank {rank} group {group} i {draw.index} {key} {box}")
    return 0


def stage_of(recipe: str) -> str:
    """pretrain or finetune, by the sections that only one of the two has."""
    import yaml

    try:
        content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{recipe}: no such recipe; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{recipe}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    keys = set(content) if isinstance(content, dict) else set()
    own = {"pretrain": {"objective", "tokens"}, "finetune": {"head", "prompts", "augment"}}
    fits = [name for name, sections in own.items() if keys & sections]
    if len(fits) != 1:
        raise UserError(
            f"{recipe}: does not tell whether it pretrains or fine-tunes; add --stage pretrain or finetune"
        )
    return fits[0]


def show_fields(stage: str) -> None:
    """`medfm pretrain --fields`: every field of the stage's recipe with its meaning and default."""
    import tyro

    schema: Any
    if stage == "pretrain":
        from pretrain.recipe import PretrainRecipe as schema
    else:
        from finetune.recipe import FinetuneRecipe as schema
    tyro.cli(schema, prog=f"medfm {stage} RECIPE.yaml", args=["--help"], config=(tyro.conf.AvoidSubcommands,))


def train(args: argparse.Namespace, fields: Sequence[str]) -> int:
    """`medfm pretrain`, `finetune` and `launch local`: workers under torchrun; the exit code of their
    verdict.
    """
    from launch.local import run_local

    stage = (args.stage or stage_of(args.recipe)) if args.command == "launch" else args.command
    overrides = list(fields)
    if getattr(args, "from_scratch", False):
        overrides.append("--encoder.from_scratch=true")
    processes = args.processes if args.processes is not None else gpus() or 1
    hosts = {
        name: getattr(args, name) for name in ("nodes", "node_rank", "rendezvous") if hasattr(args, name)
    }
    return run_local(
        stage, args.recipe, overrides, processes, run=args.run, continue_as=args.continue_as, **hosts
    )


def gpus() -> int:
    """GPUs that torch can use; looks only where there is a driver, since importing torch takes seconds."""
    if not Path("/proc/driver/nvidia").exists():
        return 0
    import torch

    return torch.cuda.device_count()


def segment(args: argparse.Namespace, _: Sequence[str]) -> int:
    """`medfm segment CHECKPOINT IMAGE --out SEG.nii.gz` with points and boxes."""
    from finetune.session import segment as segment_image

    points: list[tuple[tuple[float, ...], bool, Frame]] = []
    frames: tuple[tuple[str, Frame], ...] = (("", "index"), ("_ras", "ras"), ("_lps", "lps"))
    for option, frame in frames:
        for kind, positive in (("point", True), ("negative", False)):
            name = f"--{kind}{option}".replace("_", "-")
            points += [(numbers(text, 3, name), positive, frame) for text in getattr(args, f"{kind}{option}")]
    boxes = [numbers(text, 6, "--box") for text in args.box]
    if not points and not boxes:
        raise UserError(
            "nothing to segment: give a click with --point i,j,k (or --point-ras, --point-lps) or a --box"
        )
    images = [Path(place) for place in args.image]
    print(segment_image(
        args.checkpoint, images[0] if len(images) == 1 else images, args.out, points=points,
        boxes=[(box[:3], box[3:]) for box in boxes], modality=args.modality,
        spacing=numbers(args.spacing, (1, 2, 3), "--spacing") if args.spacing else None, device=args.device,
    ))  # fmt: skip
    return 0


def evaluate(args: argparse.Namespace, _: Sequence[str]) -> int:
    """`medfm evaluate CHECKPOINT DATA --protocol clicks`."""
    import json

    from finetune.evaluate import describe, evaluate_clicks

    scores = evaluate_clicks(
        args.checkpoint, args.data, split=args.split, sources=args.source, limit=args.limit,
        clicks=args.clicks, box=args.box, allow_seen=args.allow_seen, device=args.device,
    )  # fmt: skip
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(scores, indent=1), encoding="utf-8")
    print(describe(scores))
    return 0


def export(args: argparse.Namespace, _: Sequence[str]) -> int:
    """`medfm export CHECKPOINT --format safetensors --out DIR`."""
    from launch.export import export_safetensors

    done = export_safetensors(Path(args.checkpoint), Path(args.out))
    print(done)
    return 0 if done.ok else FAILED
