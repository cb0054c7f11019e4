"""The command line: each sub-command parses its words, then calls one function, imported only then."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from horoyolo import __version__
from horoyolo.config import AgreedError, Config, InputError, check_elastic
from horoyolo.files import write_json
from horoyolo.flag_types import file_or_dash, file_to_write, folder_to_write, fraction, positive
from horoyolo.flags import describe_train, train_config
from horoyolo.launch.status import announce_worker, report_status

if TYPE_CHECKING:
    from horoyolo.launch.hosts import Host

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75

RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "HOROYOLO_SLOT")
TELL_S = 1.0  # for rank 0 to tell what all meet, before the others end


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit status: 0 done, 1 failed, 2 bad usage or input, 75 stopped on request, to be resumed."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        parsed, unknown = build_parser().parse_known_args(words)
        if unknown:
            raise InputError(unknown_flag(parsed.command, unknown[0]))
        status = parsed.run(parsed)
    except (InputError, KeyboardInterrupt) as error:
        status = _told(error)
    except BaseException:
        report_status(FAILED)
        raise
    return report_status(status)


def _told(error: BaseException) -> int:
    """Tells what ends this process as the user should see it; gives the exit status."""
    if isinstance(error, AgreedError):
        _tell_once(error)
        return BAD_INPUT
    if isinstance(error, InputError):
        # It may be bad on this worker's host alone: each tells, since nobody else might.
        who = "" if _rank() == "0" else f"worker {_rank()} on {platform.node()}: "
        print(f"horoyolo: error: {who}{error}", file=sys.stderr)
        return BAD_INPUT
    if not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    return FAILED


def _tell_once(error: Exception) -> None:
    """Tells what all workers meet: rank 0 does, and the others leave it time, since a launcher ends all with the first that ends."""
    if _rank() == "0":
        print(f"horoyolo: error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(TELL_S)


def _rank() -> str:
    return next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "0")


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are InputErrors of one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message} (--help lists what there is)")

    def flags(self) -> list[str]:
        """Every flag this parser knows."""
        return list(self._option_string_actions)


# Flags of YOLOv5 and of later versions that a user may bring along.
NOT_YET = (
    *("--nosave", "--evolve", "--evolve_population", "--resume_evolve", "--bucket", "--quad", "--entity", "--upload_dataset", "--bbox_interval"),
    *("--artifact_alias", "--ndjson-console", "--ndjson-file", "--local_rank", "--pipeline-stages"),
)


def unknown_flag(command: str, word: str) -> str:
    """The line for a word that no parser knows: not supported yet, or the nearest known flag."""
    flag = word.split("=")[0]
    if flag in NOT_YET:
        return f"{flag}: not supported yet by horoyolo {command} {__version__}"
    known = _sub_parsers()[command].flags()
    near = difflib.get_close_matches(flag, known, n=1, cutoff=0.4)
    return f"{command}: unknown argument {word!r}; " + (f"did you mean {near[0]}?" if near else "--help lists what there is")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog="horoyolo", description="Train a YOLOv5-style detector over many machines with Horovod.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (describe, text) in COMMANDS.items():
        describe(commands.add_parser(name, help=text, description=text))
    return parser


def _sub_parsers() -> dict[str, _Parser]:
    sub_parsers = {}
    for name, (describe, text) in COMMANDS.items():
        sub_parsers[name] = _Parser(prog=f"horoyolo {name}", description=text)
        describe(sub_parsers[name])
    return sub_parsers


def _describe_train(parser: _Parser) -> None:
    describe_train(parser)
    parser.set_defaults(run=_train)


def _train(parsed: argparse.Namespace) -> int:
    from horoyolo.elastic.channel import FD
    from horoyolo.launch.environment import threads_here

    config = train_config(parsed)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_here(os.environ, len(os.sched_getaffinity(0)))))  # read when torch is imported
    from horoyolo.engine.start import start_training
    from horoyolo.engine.state import TrainingError

    try:
        status = DONE if start_training(config, on_ready=announce_worker, elastic=parsed.elastic) else STOPPED
    except TrainingError as error:
        _tell_once(error)
        status = FAILED
    except BaseException as error:
        if not (parsed.elastic and FD in os.environ):
            raise
        status = _told(error)
    if parsed.elastic:
        # The interpreter's end waits for Horovod: for threads that broken generations left behind, and for a worker that is stopped or out of reach.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(report_status(status))
    return status


def _describe_val(parser: _Parser) -> None:
    parser.add_argument("--weights", required=True, metavar="PT")
    parser.add_argument("--data", required=True, metavar="YAML")
    parser.add_argument("--single-cls", action="store_true", help="all objects of the data set are of one class, as train --single-cls has them")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--img", "--imgsz", "--img-size", type=positive, default=None, help="side in pixels; as trained where the file says it")
    parser.add_argument("--batch", "--batch-size", type=positive, default=32)
    parser.add_argument("--device", default="")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--out", type=folder_to_write, default=None, help="folder for metrics.json")
    parser.add_argument("--json", type=file_to_write, default=None, help="file for the metrics")
    parser.set_defaults(run=_val)


def _val(parsed: argparse.Namespace) -> int:
    from horoyolo.val import validate

    validate(
        weights=parsed.weights,
        data=parsed.data,
        split=parsed.split,
        single_cls=parsed.single_cls,
        img=parsed.img,
        batch=parsed.batch,
        device=parsed.device,
        precision=parsed.precision,
        num_workers=parsed.workers,
        json_files=[path for path in (parsed.json, parsed.out and parsed.out / "metrics.json") if path],
    )
    return DONE


def _describe_predict(parser: _Parser) -> None:
    parser.add_argument("--weights", required=True, metavar="PT")
    parser.add_argument("--source", required=True, metavar="FILE|DIR|GLOB")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--img", "--imgsz", "--img-size", type=positive, default=None, help="longest side in pixels; as trained where known")
    parser.add_argument("--conf", "--conf-thres", type=fraction, default=0.25, help="least confidence of a box")
    parser.add_argument("--iou", "--iou-thres", type=fraction, default=0.45, help="IoU above which the weaker box of a class goes")
    parser.add_argument("--device", default="")
    parser.set_defaults(run=_predict)


def _predict(parsed: argparse.Namespace) -> int:
    from horoyolo.predict import predict

    predict(parsed.weights, parsed.source, parsed.out, parsed.img, parsed.conf, parsed.iou, parsed.device)
    return DONE


def _describe_launch(parser: _Parser) -> None:
    from horoyolo.launch.flags import describe_launch

    describe_launch(parser)
    parser.set_defaults(run=_launch)


def _launch(parsed: argparse.Namespace) -> int:
    from horoyolo.elastic.launch import is_elastic, launch_elastic
    from horoyolo.launch.remote import LaunchError
    from horoyolo.launch.slurm import slurm_options
    from horoyolo.launch.start import chosen_hosts, launch, write_batch

    words = parsed.job[1:] if parsed.job[:1] == ["--"] else parsed.job
    if words[:1] != ["train"]:
        raise InputError(f"launch: -- train ... is wanted behind the flags of launch, not {' '.join(words) or 'nothing'!r}")
    if is_elastic(parsed):
        config = check_job(words, parsed.max_np or parsed.min_np)
        check_elastic(config)
        return launch_elastic(parsed, words, config.batch)
    if parsed.slurm and parsed.script:
        options = slurm_options(parsed)
        check_job(words, options.nodes * options.workers_per_node)
        return write_batch(parsed, words)
    hosts = chosen_hosts(parsed, os.environ)
    config = check_job(words, sum(host.slots for host in hosts))
    try:
        if parsed.stage:
            words = [*words, "--data", _staged(config.data, parsed, hosts)]
        return launch(parsed, words, hosts)
    except LaunchError as error:
        print(f"horoyolo: error: {error}", file=sys.stderr)
        return FAILED


def _staged(data: str, parsed: argparse.Namespace, hosts: Sequence[Host]) -> str:
    """The data.yaml of the copies that all hosts have of a data set, made where they are missing."""
    from horoyolo.data.spec import load_data_spec
    from horoyolo.data.staging import plan_layout
    from horoyolo.launch.start import stage_data

    return stage_data(plan_layout(load_data_spec(data)), parsed, hosts)


def check_job(words: list[str], num_workers: int) -> Config:
    """Raises InputError for what can be seen to be wrong with a job before any worker is started; imports no torch. Gives its configuration."""
    parsed, unknown = build_parser().parse_known_args(words)
    if unknown:
        raise InputError(unknown_flag(parsed.command, unknown[0]))
    config = train_config(parsed)
    if 0 < config.batch < num_workers:
        raise InputError(f"batch = {config.batch} over {num_workers} workers; at least one image for each is wanted")
    from horoyolo.data.spec import load_data_spec

    load_data_spec(config.data)
    return config


def _describe_doctor(parser: _Parser) -> None:
    from horoyolo.launch.flags import describe_doctor

    describe_doctor(parser)
    parser.set_defaults(run=_doctor)


def _doctor(parsed: argparse.Namespace) -> int:
    from horoyolo.launch.doctor import run_doctor
    from horoyolo.launch.start import chosen_ssh, named_hosts

    return run_doctor(named_hosts(parsed, os.environ), parsed.data, parsed.nic, parsed.json, chosen_ssh(parsed))


def _describe_data(parser: _Parser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    convert = actions.add_parser("convert", help="another format to YOLO folders and a data.yaml")
    formats = convert.add_subparsers(dest="format", required=True, metavar="FORMAT")
    voc = formats.add_parser("voc", help="Pascal VOC: Annotations, JPEGImages, ImageSets/Main")
    voc.add_argument("--source", required=True, metavar="DIR")
    voc.set_defaults(run=_convert_voc)
    coco = formats.add_parser("coco", help="COCO json")
    coco.add_argument("--source", required=True, metavar="ANN.json")
    coco.add_argument("--images", required=True, metavar="DIR")
    coco.set_defaults(run=_convert_coco)
    for sub_parser in (voc, coco):
        sub_parser.add_argument("--out", required=True, metavar="DIR")
        sub_parser.add_argument("--names", nargs="+", default=None, help="classes in this order; else alphabetical")
    check = actions.add_parser("check", help="look at every image and label and tell what is wrong with them")
    check.add_argument("--data", required=True, metavar="YAML")
    check.add_argument("--splits", nargs="+", default=None, choices=("train", "val", "test"), help="look at these alone")
    to_file = "file for findings, figures and the content's hash; - prints the last two"
    check.add_argument("--json", type=file_or_dash, metavar="FILE", default=None, help=to_file)
    check.set_defaults(run=_check_data)
    stats = actions.add_parser("stats", help="classes, sizes and shapes of boxes at the training size, against anchors; takes the flags of train")
    describe_train(stats)
    stats.add_argument("--augmented", action="store_true", help="also what the model sees of the training images")
    stats.add_argument("--out", type=folder_to_write, metavar="DIR", default=None, help="folder for plots")
    stats.add_argument("--json", type=file_to_write, metavar="FILE", default=None, help="file for the figures")
    stats.set_defaults(run=_show_stats)
    synth = actions.add_parser("synth", help="a small synthetic data set")
    synth.add_argument("--out", required=True, metavar="DIR")
    synth.add_argument("--images", type=positive, default=200)
    synth.add_argument("--seed", type=int, default=0)
    synth.set_defaults(run=_synthesise)


def _convert_voc(parsed: argparse.Namespace) -> int:
    from horoyolo.data.convert import convert_voc

    return _print_lines(convert_voc(parsed.source, parsed.out, parsed.names).lines())


def _convert_coco(parsed: argparse.Namespace) -> int:
    from horoyolo.data.convert import convert_coco

    return _print_lines(convert_coco(parsed.source, parsed.images, parsed.out, parsed.names).lines())


def _check_data(parsed: argparse.Namespace) -> int:
    from horoyolo.data.check import check_splits
    from horoyolo.data.scan import scan_split
    from horoyolo.data.spec import load_data_spec
    from horoyolo.data.staging import describe_content

    spec = load_data_spec(parsed.data)
    names = parsed.splits or spec.splits_to_look_at()
    if parsed.json == "-":
        return _print_lines([json.dumps(describe_content([scan_split(spec, name) for name in names]))])
    checks = check_splits(spec, names)
    _print_lines([line for check in checks for line in check.lines()])
    if parsed.json:
        found = {check.scan.split: check.as_dict() for check in checks}
        write_json(parsed.json, describe_content([scan_split(spec, name, strict=False) for name in names]) | {"found": found})
    for name in parsed.splits or [name for name in names if name != "test"]:
        scan_split(spec, name)  # what training would refuse ends this with the same line
    return DONE


def _show_stats(parsed: argparse.Namespace) -> int:
    if not (hasattr(parsed, "cfg") or hasattr(parsed, "weights")):
        parsed.cfg = "yolov5n"  # all sizes of YOLOv5 have the same anchors
    config = train_config(parsed)
    from horoyolo.stats import show_stats

    show_stats(config, parsed.augmented, parsed.out, parsed.json)
    return DONE


def _synthesise(parsed: argparse.Namespace) -> int:
    from horoyolo.data.synthetic import write_synthetic

    write_synthetic(parsed.out, parsed.images, parsed.seed)
    return _print_lines([f"{parsed.images} images in {parsed.out}; train with --data {Path(parsed.out) / 'data.yaml'}"])


def _describe_bench(parser: _Parser) -> None:
    from horoyolo.bench.flags import describe_allreduce, describe_compression, describe_elastic, describe_scaling, describe_step

    benches = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    for name, describe, text in (
        ("step", describe_step, "training steps a second, precisions and layouts side by side"),
        ("scaling", describe_scaling, "what the exchange costs, against processes without any"),
        ("allreduce", describe_allreduce, "a sum over workers by its size, against stock Horovod and plain sockets"),
        ("compression", describe_compression, "what each way to sum gradients costs, on links of several speeds"),
        ("elastic", describe_elastic, "how soon training goes on when a worker is killed, and what being ready for it costs"),
    ):
        bench = benches.add_parser(name, help=text)
        describe(bench)
        bench.set_defaults(run=_bench)


def _bench(parsed: argparse.Namespace) -> int:
    from importlib import import_module

    from horoyolo.launch.remote import LaunchError

    try:
        getattr(import_module(f"horoyolo.bench.{parsed.bench}"), f"bench_{parsed.bench}")(parsed)
    except LaunchError as error:
        print(f"horoyolo: error: {error}", file=sys.stderr)
        return FAILED
    return DONE


def _describe_report(parser: _Parser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=Path)
    parser.add_argument("--ledger", action="store_true", help="prove that each image of each epoch was used exactly once, or list which was not")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", default=None, help="file for the figures")
    parser.set_defaults(run=_report)


def _report(parsed: argparse.Namespace) -> int:
    from horoyolo.report.diagnose import diagnose_run
    from horoyolo.report.ledger import FILE, read_account

    if not parsed.ledger:
        lines = diagnose_run(parsed.run_folder)
        if parsed.json:
            write_json(parsed.json, {"diagnosis": lines})
        return _print_lines(lines)
    account = read_account(parsed.run_folder / FILE)
    if parsed.json:
        write_json(parsed.json, account.as_json())
    _print_lines(account.lines())
    return DONE if account.exact else FAILED


def _print_lines(lines: list[str]) -> int:
    print("\n".join(lines))
    return DONE


COMMANDS: dict[str, tuple[Callable[[_Parser], None], str]] = {
    "train": (_describe_train, "train a detector; every worker runs this"),
    "val": (_describe_val, "score weights on a data set"),
    "predict": (_describe_predict, "find objects in images"),
    "launch": (_describe_launch, "start the workers of a job"),
    "doctor": (_describe_doctor, "find out what is wrong with hosts before a job does"),
    "data": (_describe_data, "convert, check and make data sets"),
    "report": (_describe_report, "what a run's records say: over-fitted, unfinished or about right; which images were used"),
    "bench": (_describe_bench, "measure this machine"),
}
