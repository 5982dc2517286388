"""The `medfm` command. Nothing heavy is imported before it is known what is asked for."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NoReturn

USER_ERROR = 2
INTERRUPTED = 130

MODALITIES = ("CT", "MR", "XR", "PT")
EXPORT_FORMATS = ("safetensors", "hf", "monai", "timm", "onnx", "torch-export")
NOT_YET = {
    "predict": "use `medfm segment` with a click",
    "plan": "a short run with `medfm pretrain` shows its time and memory",
}
"""Commands of the design that this version does not have, and what to use until then."""
LAUNCHERS_NOT_YET = ("hostfile", "slurm", "kubernetes")

_TRIPLES = (
    "--point",
    "--negative",
    "--point-ras",
    "--negative-ras",
    "--point-lps",
    "--negative-lps",
    "--box",
)
_RECIPE_HELP = (
    "after RECIPE.yaml, any field of the recipe may be set: --engine.updates 200 --encoder.size small"
)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"medfm: error: {message}; see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="medfm", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train medical-imaging foundation models from scratch: raw scans to shards, pretraining, "
        "promptable segmentation, exported weights.",
        epilog="not yet in this version: predict, plan, launch hostfile|slurm|kubernetes,\n"
        "export to hf, monai, timm, onnx and torch-export\n\n"
        "exit codes: 0 done, 2 wrong input, 3 failed, 4 hung, 5 out of memory, 75 stopped and saved",
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    p = commands.add_parser("quickstart", help="the whole job, small, in minutes, on this machine")
    p.add_argument("--data", metavar="DIR", help="your own folder of scans instead of generated phantoms")
    p.add_argument("--out", metavar="DIR", default="quickstart", help="default: ./quickstart")
    p.add_argument(
        "--short", action="store_true", help="under two minutes: proves that it runs, not that it learns"
    )
    p.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="pretraining processes; default 2, or 1 where there is one GPU",
    )
    p.add_argument("--modality", choices=MODALITIES, help="with --data: of images that do not say")
    p.add_argument(
        "--burned-in", choices=["accept", "quarantine"], help="with --data: radiographs that may hold text"
    )

    _add_shards(
        commands.add_parser(
            "shards", help="build | merge | verify | inspect | order: raw scans to training shards"
        )
    )

    for name, what in (("pretrain", "masked autoencoding on shards"),
                       ("finetune", "promptable segmentation on labelled shards")):  # fmt: skip
        p = commands.add_parser(name, help=what, epilog=_RECIPE_HELP, allow_abbrev=False)
        _add_training(p)
        p.add_argument(
            "--fields", action=_Fields, nargs=0, help="list every field of the recipe and its default"
        )
        if name == "finetune":
            p.add_argument(
                "--from-scratch", action="store_true", help="no pretrained encoder: the matched control"
            )
    p = commands.add_parser("launch", help="local RECIPE.yaml: training on this machine")
    p.add_argument("where", choices=["local", *LAUNCHERS_NOT_YET], metavar="local")
    p.epilog = _RECIPE_HELP
    p.add_argument(
        "--stage", choices=["pretrain", "finetune"], help="default: told from the recipe's sections"
    )
    _add_training(p)
    p.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="hosts, each with this command; default 1"
    )
    p.add_argument("--node-rank", type=int, default=0, metavar="I", help="which of them this is, from 0")
    p.add_argument("--rendezvous", default="", metavar="HOST:PORT", help="of host 0, where they meet")

    p = commands.add_parser(
        "segment", help="one image, with clicks and boxes, to a mask on the image's own grid"
    )
    p.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="run folder or exported folder of a fine-tuned model"
    )
    p.add_argument(
        "image", nargs="+", metavar="IMAGE", help="scan file or DICOM folder; one for each channel"
    )
    p.add_argument("--out", required=True, metavar="SEG.nii.gz")
    for frame, meaning in (("", "voxel index, i fastest, 0-based"), ("-ras", "mm, x to the right"),
                           ("-lps", "mm, x to the left")):  # fmt: skip
        axes = "x,y,z" if frame else "i,j,k"
        p.add_argument(
            f"--point{frame}", action="append", default=[], metavar=axes, help=f"inside; {meaning}"
        )
        p.add_argument(
            f"--negative{frame}", action="append", default=[], metavar=axes, help=f"outside; {meaning}"
        )
    p.add_argument("--box", action="append", default=[], metavar="i,j,k,i,j,k",
                   help="inclusive smallest and largest voxel index")  # fmt: skip
    p.add_argument("--modality", choices=MODALITIES, help="where the file does not say")
    p.add_argument("--spacing", metavar="MM[,MM[,MM]]", help="of x, y, z, where the file does not say")
    p.add_argument("--device", default="cpu", help="default cpu")

    p = commands.add_parser("evaluate", help="simulated clicks on the labelled test cases of a shard dataset")
    p.add_argument("checkpoint", metavar="CHECKPOINT")
    p.add_argument("data", metavar="DATA", help="shard dataset")
    p.add_argument("--protocol", choices=["clicks", "dense"], default="clicks")
    p.add_argument("--split", default="test")
    p.add_argument(
        "--source", action="append", default=[], metavar="NAME", help="these sources only (may be repeated)"
    )
    p.add_argument("--limit", type=int, metavar="N", help="at most N images")
    p.add_argument("--clicks", type=int, default=5, metavar="N", help="clicks on each object; default 5")
    p.add_argument("--box", action="store_true", help="a tight box first, as a step of its own")
    p.add_argument("--json", metavar="FILE", help="per case and mean figures")
    p.add_argument(
        "--allow-seen", action="store_true", help="go on though test subjects were seen in training"
    )
    p.add_argument("--device", default="cpu")

    p = commands.add_parser(
        "probe",
        help="held-out loss and few-shot probes of a pretraining checkpoint",
        epilog="--follow scores every checkpoint a run keeps, while it trains: start it beside the run. It "
        "ends with the run, may be stopped and started again, and changes nothing of the run.",
    )
    p.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT", help="run folder, checkpoint or exported encoder"
    )
    p.add_argument("data", nargs="?", metavar="DATA", help="shard dataset; default: the one of the run")
    p.add_argument("--follow", metavar="RUN", help="folder of a run, in place of CHECKPOINT and DATA")
    p.add_argument(
        "--labelled", metavar="DIR", help="labelled shard dataset of the probes; default: the recipe's"
    )
    p.add_argument("--split", help="of DATA, for the held-out loss; default: the recipe's")
    p.add_argument("--json", metavar="FILE", help="write the figures")
    p.add_argument(
        "--poll", type=float, default=10.0, metavar="SECONDS", help="between looks of --follow; default 10"
    )
    p.add_argument("--device", default="cpu", help="default cpu")

    p = commands.add_parser(
        "export", help="weights with their adaptation plan, checked by loading them again"
    )
    p.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="run folder, checkpoint folder or exported folder"
    )
    p.add_argument("--format", choices=EXPORT_FORMATS, default="safetensors", metavar="safetensors")
    p.add_argument("--out", required=True, metavar="DIR")

    p = commands.add_parser(
        "status",
        help="how a run fares, told from its folder: speed, losses, checkpoints, and why it ended",
    )
    p.add_argument("run_folder", metavar="RUN")
    p.add_argument("--json", action="store_true", help="one JSON object for programs")
    p.add_argument("--follow", action="store_true", help="look again until the run is over")
    p.add_argument(
        "--poll", type=float, default=2.0, metavar="SECONDS", help="between looks of --follow; default 2"
    )

    commands.add_parser("doctor", help="what on this machine will stop a run")
    return top


class _Fields(argparse.Action):
    """`--fields`: print the recipe's fields and end."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from launch.commands import show_fields

        show_fields(parser.prog.split()[-1])
        parser.exit()


def _add_training(p: argparse.ArgumentParser) -> None:
    p.add_argument("recipe", metavar="RECIPE.yaml")
    p.add_argument("--processes", type=int, metavar="N", help="default: one per GPU, or 1")
    p.add_argument("--run", metavar="DIR", help="run folder; a run found there is continued")
    p.add_argument("--continue-as", metavar="NAME", help="go on with a changed recipe as a new segment")


def _add_cluster(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--workers", type=int, metavar="N", help="processes; default: one for each core; 0: without processes"
    )
    p.add_argument(
        "--scheduler",
        metavar="tcp://HOST:PORT",
        help="a running dask.distributed cluster, in place of --workers",
    )


def _add_shards(p: argparse.ArgumentParser) -> None:
    actions = p.add_subparsers(dest="action", metavar="build|merge|verify|inspect|order", required=True)
    stated = (
        "what you know of each source (labels, subjects, licence, ...) stands in a YAML file: docs/data.md"
    )
    b = actions.add_parser("build", help="scans to a shard dataset, or what is new into one", epilog=stated)
    b.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="folders, tables (CSV, Parquet) and fsspec addresses (s3://...), or one YAML file",
    )
    b.add_argument("--out", required=True, metavar="DIR", help="folder or fsspec address")
    b.add_argument("--root", metavar="DIR", help="folder that the paths in the YAML file start from")
    b.add_argument(
        "--private", metavar="DIR", help="hash key and real paths; default OUT-private, keep it to yourself"
    )
    _add_cluster(b)
    b.add_argument(
        "--part",
        metavar="I/N",
        help="read the I-th of N shares only, as one job of an array; then `shards merge`",
    )
    b.add_argument(
        "--work", metavar="DIR", help="unfinished state, as large as the dataset; default PRIVATE/work"
    )
    b.add_argument("--drop-missing", action="store_true", help="remove samples whose inputs are gone")
    b.add_argument("--retry", action="store_true", help="read inputs again that were refused")
    b.add_argument("--exact", action="store_true", help="store float32 where 16 bits would not be exact")
    b.add_argument("--seed", type=int, help="of the split")
    b.add_argument("--split", metavar="TRAIN,VAL,TEST", help="shares of the subjects; default 0.8,0.1,0.1")
    b.add_argument("--shard-samples", type=int, metavar="N", help="most samples in a shard; default 64")
    b.add_argument("--modality", choices=MODALITIES, help="of images that do not say")
    b.add_argument(
        "--layout", choices=["auto", "msd", "nnunet", "bids", "table", "folder", "dicom", "webdataset"]
    )
    b.add_argument("--spacing", metavar="MM[,MM[,MM]]", help="z,y,x or y,x, of files that state none")
    b.add_argument(
        "--field-mm", type=float, metavar="MM", help="width of a picture whose spacing is not known"
    )
    b.add_argument(
        "--burned-in",
        choices=["accept", "quarantine", "mask"],
        help="radiographs that may hold burned-in text",
    )
    b.add_argument("--deface", choices=["mask", "remove"], help="hide or overwrite faces in head scans")
    b.add_argument("--label-origin", choices=["human", "model", "unknown"])
    m = actions.add_parser("merge", help="complete a dataset of which every part is read")
    m.add_argument(
        "parts", nargs="*", metavar="WORK", help="work folders; default: those in the private folder"
    )
    m.add_argument("--out", required=True, metavar="DIR", help="folder or fsspec address")
    m.add_argument("--private", metavar="DIR", help="of the parts; default OUT-private")
    _add_cluster(m)
    v = actions.add_parser("verify", help="read every byte and compare every checksum")
    v.add_argument("data", metavar="DIR")
    i = actions.add_parser("inspect", help="what a dataset holds; with --key, one sample and its picture")
    i.add_argument("data", metavar="DIR")
    i.add_argument("--key", help="sample key, or how it begins")
    i.add_argument("--picture", metavar="FILE.png", help="write three planes with the label over them")
    o = actions.add_parser("order", help="what a recipe would draw: composition, rounding, repeats")
    o.add_argument("data", metavar="DIR")
    o.add_argument(
        "recipe_file", nargs="?", metavar="RECIPE.yaml", help="pretraining recipe; default: the defaults"
    )
    o.add_argument("--recipe", metavar="RECIPE.yaml", help="the same, by name")
    o.add_argument("--processes", type=int, default=1, metavar="N")
    o.add_argument("--updates", type=int, default=2, metavar="N", help="updates to list")
    o.add_argument(
        "--simulate", type=int, nargs="?", const=0, metavar="UPDATES",
        help="instead of listing draws, what a run reads and how it mixes, for so many updates; default: "
        "until every sample was drawn",
    )  # fmt: skip
    o.add_argument("--nodes", type=int, default=1, metavar="N", help="of the simulated run")
    o.add_argument("--ranks-per-node", type=int, default=1, metavar="R")
    o.add_argument(
        "--cache",
        default="16",
        metavar="SHARDS|GB",
        help="of a node: 16 (shards for each of its lanes) or 200GB",
    )
    o.add_argument("--json", metavar="FILE", help="write the figures of the simulated run")


def _joined(argv: Sequence[str]) -> list[str]:
    """`--point-ras -12.5,3,4` as one word: argparse would take the value for an option."""
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        value = next(rest, None) if word in _TRIPLES else None
        if value is None:
            words.append(word)
        elif re.match(r"-[\d.]", value):
            words.append(f"{word}={value}")
        else:
            words += [word, value]
    return words


def _run(argv: Sequence[str]) -> int:
    if argv and argv[0] in NOT_YET:
        raise _user_error(f"`medfm {argv[0]}` is not in this version yet; {NOT_YET[argv[0]]}")
    top = parser()
    args, extra = top.parse_known_args(_joined(argv))
    if extra and args.command not in ("pretrain", "finetune", "launch"):
        top.error(f"{extra[0]!r} is not known to `medfm {args.command}`")
    if args.command == "launch" and args.where in LAUNCHERS_NOT_YET:
        raise _user_error(
            f"`medfm launch {args.where}` is not in this version yet; use `medfm launch local` on one machine"
        )
    if args.command == "export" and args.format != "safetensors":
        raise _user_error(f"`--format {args.format}` is not in this version yet; `--format safetensors` is")
    if args.command == "evaluate" and args.protocol != "clicks":
        raise _user_error(f"`--protocol {args.protocol}` is not in this version yet; `--protocol clicks` is")
    if args.command == "quickstart":
        from launch.quickstart import quickstart

        fields = [
            f"--{name}={value}"
            for name, value in (("modality", args.modality), ("burned-in", args.burned_in))
            if value
        ]
        return quickstart(
            args.out, data=args.data, short=args.short, processes=args.processes, fields=tuple(fields)
        )
    if args.command == "doctor":
        from launch.doctor import doctor

        return doctor()
    if args.command == "status":
        from launch.status_text import status

        return status(args)
    if args.command == "probe":
        from launch.probe import probe

        return probe(args)
    from launch import commands

    return commands.run(args, extra)


def _user_error(message: str) -> Exception:
    from engine.errors import UserError

    return UserError(message)


def _is_for_people(error: BaseException) -> bool:
    """A `UserError` of any room, or the system saying that a named file cannot be used."""
    modules = ("data_pipeline.errors", "model.errors", "engine.errors")
    kinds = tuple(sys.modules[name].UserError for name in modules if name in sys.modules)
    return isinstance(error, kinds) or (isinstance(error, OSError) and error.filename is not None)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 wait until the launcher listens, which ends in a saved state."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with its code; an error for people is one line on stderr and exit code 2."""
    words = sys.argv[1:] if argv is None else argv
    trains = bool(words) and words[0] in ("pretrain", "finetune", "launch")
    try:
        with _signals_held() if trains and sys.platform == "linux" else nullcontext():
            code = _run(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("medfm: stopped; start the same command again to go on", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if not _is_for_people(error):
            raise
        print(f"medfm: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = USER_ERROR
    sys.exit(code)


if __name__ == "__main__":
    main()
