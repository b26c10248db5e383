"""The arguments of every command, and what is said of wrong ones. Needs nothing but the standard library."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Iterable

from rsaft_fast import __version__
from rsaft_fast.cli import texts
from rsaft_fast.cli.values import checkpoint, checkpoint_or_all, gigabytes, natural, path, place, positive, radii
from rsaft_fast.errors import UserError

_KEY = re.compile(r"[A-Za-z_][\w.]*=")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="rsaft-fast", description=texts.DESCRIPTION, formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"rsaft-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, summary: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=text, formatter_class=_Help)

    train = add("train", "fine-tune as a recipe says", texts.TRAIN)
    train.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file, or the name of a shipped recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace the recipe's")
    train.add_argument(
        "--help-config",
        nargs="?",
        const="",
        metavar="KEY",
        help="print every key (or KEY, and those below it), its default and what it does",
    )

    demo = add("demo", "see plain fine-tuning and RSA-FT side by side on the embedded playground", texts.DEMO)
    demo.add_argument("--steps", type=positive, default=40, metavar="N", help="updates of each run (default: 40)")
    demo.add_argument("--seed", type=natural, default=0, metavar="N", help="of both runs (default: 0)")
    proxies = ("brittle", "fair", "mixed", "mixed-long", "adversarial")
    demo.add_argument("--proxy", choices=proxies, default="brittle", help="which proxy reward (default: brittle)")
    demo.add_argument(
        "--output", type=path, metavar="FOLDER", help="where it writes (default: runs/demo, or the next free one)"
    )

    experiment = add("experiment", "find out on the playground what smoothing does, over seeds", texts.EXPERIMENT)
    what = experiment.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="one small table, within ten minutes (default)")
    what.add_argument("--full", action="store_true", help="every set, over hours; goes on where it was stopped")
    what.add_argument("--set", action="append", metavar="NAME", help="this set alone; may be given again")
    experiment.add_argument("--list", action="store_true", help="show the sets and their runs, done or not, and end")
    experiment.add_argument("--report", action="store_true", help="run nothing: tables and pictures of what is there")
    experiment.add_argument("--seeds", nargs="+", type=natural, metavar="N", help="in place of the sets' own")
    experiment.add_argument("--proxies", nargs="+", metavar="NAME", help="runs on these rewards alone")
    experiment.add_argument("--jobs", type=positive, metavar="N", help="runs at a time (default: GPUs, or cores)")
    experiment.add_argument("--budget", type=positive, metavar="MINUTES", help="begin no new run after this long")
    experiment.add_argument("--output", type=path, metavar="FOLDER", help="of the results (default: as above)")
    experiment.add_argument("--page", type=path, metavar="FILE", help="also write all tables between FILE's markers")
    experiment.add_argument("--readme", type=path, metavar="FILE", help="also write the main one between FILE's")
    experiment.add_argument("--alarms", type=path, metavar="FILE", help="also write how often monitors would warn")

    report = add("report", "show a run, several runs or an experiment in one HTML page", texts.REPORT)
    report.add_argument(
        "runs", nargs="+", type=path, metavar="RUN", help="run folders, a folder of them, or an experiment's folder"
    )
    report.add_argument(
        "-o", "--output", type=path, metavar="FILE", help="default: report.html in the folder; of several, here"
    )

    compare = add("compare", "set runs side by side: the demo's picture and the report of your own", texts.COMPARE)
    compare.add_argument("runs", nargs="+", type=path, metavar="RUN", help="run folders, or a folder of them")
    compare.add_argument(
        "-o", "--output", type=path, metavar="FOLDER", help="new (default: runs/comparison, or the next free one)"
    )

    ab = add("ab", "a page on which people compare two sets of pictures, blindly", texts.AB)
    ab.add_argument("sets", nargs="*", type=path, metavar="PICTURES", help="two folders of pictures, or two runs")
    ab.add_argument("-o", "--output", type=path, default="ab.html", metavar="FILE", help="the page (default: ab.html)")
    ab.add_argument("--prompts", type=place, metavar="FILE", help="a file or set, as sample's --prompts-file")
    ab.add_argument("--seed", type=natural, default=0, metavar="N", help="of order and sides (default: 0)")
    ab.add_argument(
        "--side", type=positive, default=768, metavar="PIXELS", help="longest side of a picture (default: 768)"
    )
    ab.add_argument("--read", nargs="+", type=path, metavar="CSV", help="count exported answers instead")

    sample = add("sample", "draw pictures with a pipeline or a run", texts.SAMPLE)
    sample.add_argument(
        "pipeline",
        nargs="?",
        type=place,
        metavar="PIPELINE",
        help="folder in diffusers' format, hub id, or playground (default: the run's)",
    )
    trained = sample.add_mutually_exclusive_group()
    trained.add_argument(
        "--run", type=path, metavar="FOLDER", help="a run folder: its newest checkpoint and its sampler settings"
    )
    trained.add_argument("--lora", type=path, metavar="PATH", help="a LoRA in diffusers' format, file or folder")
    sample.add_argument("--untrained", action="store_true", help="with --run: its settings, without its training")
    sample.add_argument(
        "--checkpoint", type=checkpoint, metavar="STEP", help="with --run: best, or the weights of that step"
    )
    prompts = sample.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="prompts, each in quotes")
    prompts.add_argument(
        "--prompts-file",
        type=place,
        metavar="FILE",
        help=".txt, .csv, .tsv, .json, .jsonl, .parquet, starter, playground, or a set: drawbench, hpdv2, hpdv2-photo, "
        "hpdv2-400, partiprompts, geneval, geneval2, dpg-bench, unigenbench, ocr, pickapic, or NAME=PATH",
    )
    sample.add_argument(
        "--seeds", nargs="+", type=natural, default=[0], metavar="N", help="a picture each (default: 0)"
    )
    sample.add_argument("--negative", metavar="TEXT", help="negative prompt (default: the run's, else none)")
    _add_sampling(sample)
    _add_device(sample)
    _add_batch_size(sample)
    sample.add_argument("--output", type=path, metavar="FOLDER", help="default: samples, or the next free one")

    score = add("score", "score pictures with reward models", texts.SCORE)
    _add_pictures(score)
    score.add_argument(
        "--calibration", type=path, metavar="FILE", help="also write each reward's centre and width to this file"
    )
    score.add_argument(
        "--output", default="scores.csv", type=path, metavar="FILE", help="new CSV (default: scores.csv)"
    )
    _add_device(score)
    _add_batch_size(score)

    evaluate = add("eval", "compare models and runs on prompts, by every reward asked for", texts.EVAL)
    evaluate.add_argument(
        "models",
        nargs="+",
        type=place,
        metavar="RUN|MODEL",
        help="run folders, and pipelines as sample takes them; a run's own pipeline is compared with by itself",
    )
    asked = evaluate.add_mutually_exclusive_group()
    asked.add_argument("--prompts", type=place, metavar="FILE|SET", help="as sample's --prompts-file")
    asked.add_argument(
        "--protocol",
        type=place,
        metavar="NAME[=PATH]",
        help="a frozen set with its number of pictures: drawbench, hpdv2-400, hpdv2-3200, partiprompts, geneval, "
        "geneval2, dpg-bench, unigenbench; from the hub, or at PATH",
    )
    evaluate.add_argument(
        "--rewards",
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help="as radius's --judges; what the runs were trained on is always there, with a star (default: their judges)",
    )
    evaluate.add_argument(
        "--checkpoint",
        type=checkpoint_or_all,
        metavar="STEP",
        help="of every run: last (default), best, all, or a number of updates; all compares runs at equal reward",
    )
    evaluate.add_argument("--count", type=positive, metavar="N", help="the first N prompts alone")
    evaluate.add_argument("--pictures", type=positive, metavar="N", help="of each prompt (default: 1)")
    evaluate.add_argument("--seed", type=natural, metavar="N", help="of each prompt's first picture (default: 0)")
    evaluate.add_argument(
        "--features", type=place, metavar="PATH", help="DINOv2 or DINOv3, for FID, KID and diversity: folder or hub id"
    )
    evaluate.add_argument(
        "--s1", type=float, default=0.3, metavar="R", help="L2 radius of the sharpness S1; 0 leaves it out (0.3)"
    )
    _add_sampling(evaluate)
    _add_device(evaluate)
    _add_batch_size(evaluate)
    evaluate.add_argument(
        "--output", type=path, metavar="FOLDER", help="new, or begun (default: RUN/evaluation/PROMPTS)"
    )

    sharpness = add("sharpness", "say how sharp reward models are at pictures", texts.SHARPNESS)
    _add_pictures(sharpness)
    sharpness.add_argument(
        "--radius", nargs="+", type=float, default=[0.1, 0.3, 1.0], metavar="R", help="of the ball (default: 0.1 0.3 1)"
    )
    sharpness.add_argument("--norm", choices=("l2", "rms"), default="l2", help="of the whole picture, or per element")
    sharpness.add_argument(
        "--space",
        choices=("pixel01", "pixel11", "reward_input", "latent"),
        default="pixel01",
        help="where the ball lies (default: pixel01)",
    )
    sharpness.add_argument("--pipeline", type=place, metavar="PATH", help="with --space latent: whose latents")
    sharpness.add_argument("--steps", type=positive, default=20, metavar="N", help="of the search (default: 20)")
    sharpness.add_argument(
        "--restarts", type=natural, default=0, metavar="N", help="further searches from random points (default: 0)"
    )
    sharpness.add_argument("--seed", type=natural, default=0, metavar="N", help="of the random points (default: 0)")
    sharpness.add_argument(
        "--with-reward",
        action="append",
        default=[],
        metavar="NAME=PATH[,key=value]",
        help="a reward whose scores S1 is correlated with",
    )
    sharpness.add_argument(
        "--output", default="sharpness.csv", type=path, metavar="FILE", help="new CSV (default: sharpness.csv)"
    )
    _add_device(sharpness)
    _add_batch_size(sharpness)

    push = add("push", "publish what a run trained on the Hugging Face hub, with a model card", texts.PUSH)
    push.add_argument("run", type=path, metavar="RUN", help="a run folder")
    push.add_argument("--repo", required=True, metavar="OWNER/NAME", help="the model repository, made if need be")
    push.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which export (default: last)")
    push.add_argument(
        "--license",
        metavar="ID",
        help="as the hub calls it, such as apache-2.0 (default: the base model's, where known)",
    )
    push.add_argument(
        "--evaluation", type=path, metavar="FOLDER", help="of eval, for the card (default: the run's newest)"
    )
    push.add_argument("--private", action="store_true", help="a repository that is made is private")
    push.add_argument("--dry-run", action="store_true", help="send nothing: show the files and the card")

    serve = add("serve", "serve reward models to other processes, over HTTP", texts.SERVE)
    _add_reward(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=natural, default=8765, metavar="N", help="0 takes a free one (default: 8765)")
    _add_device(serve)
    serve.add_argument(
        "--max-pictures", type=positive, default=64, metavar="N", help="of a request and of a call (default: 64)"
    )
    serve.add_argument(
        "--max-bytes", type=positive, default=256 * 2**20, metavar="N", help="of a request (default: 268435456)"
    )
    serve.add_argument(
        "--max-prompt", type=positive, default=10_000, metavar="N", help="characters of a prompt (default: 10000)"
    )
    serve.add_argument("--timeout", type=positive, default=300, metavar="S", help="of a request (default: 300)")

    convert = add("convert", "write a reward's pickle as safetensors", texts.CONVERT)
    convert.add_argument("source", type=place, metavar="SRC", help="what reward.path would be: file, folder or hub id")
    convert.add_argument("folder", type=path, metavar="DST", help="folder to write into")
    convert.add_argument("--reward", required=True, metavar="NAME", help="the family, such as hpsv2.1")
    convert.add_argument("--force", action="store_true", help="replace files that are there")

    bench = add("bench", "time the SAM step on this machine, beside what others use", texts.BENCH)
    bench.add_argument("--cases", metavar="A,B", help="parameter lists, images, host (default: all that fit)")
    bench.add_argument("--dtypes", metavar="A,B", help="of fp32, bf16 (with an fp32 master), 8bit (default: all)")
    bench.add_argument("--providers", metavar="A,B", help="who is measured (default: all that are installed)")
    bench.add_argument("--results", type=path, metavar="FOLDER", help="write FOLDER/<gpu>/<date>.json, row by row")
    bench.add_argument("--quick", action="store_true", help="two models' lists, five calls instead of twenty")
    bench.add_argument("--budget", type=positive, metavar="SECONDS", help="begin nothing new after this long")
    bench.add_argument("--goals", action="store_true", help="also show the project's goals, and which are met")
    bench.add_argument("--memory", action="store_true", help="whole updates instead: --cases names runs of that list")
    bench.add_argument("--list", action="store_true", help="show the cases, dtypes and providers, and end")

    estimate = add("estimate", "say how much memory a recipe needs, before anything loads", texts.ESTIMATE)
    estimate.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of a shipped recipe")
    estimate.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace the recipe's")
    estimate.add_argument("--quick", action="store_true", help="do not look for keys that would lower the peak")
    estimate.add_argument(
        "--card", type=gigabytes, metavar="GB", help="memory of the card to compare with (default: the one here)"
    )
    estimate.add_argument(
        "--gpus", type=positive, default=1, metavar="N", help="the peak of one of N that share the run"
    )
    estimate.add_argument("--json", action="store_true", help="print one JSON object, in bytes")

    radius = add("radius", "find the image radius to smooth with, from rewards that are not trained on", texts.RADIUS)
    radius.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of a shipped recipe")
    radius.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace the recipe's")
    radius.add_argument(
        "--judges",
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help="rewards with a gradient, as score's --reward; playground/NAME, python:module:name, or LABEL: before any "
        "of these (default: the recipe's judges)",
    )
    radius.add_argument(
        "--radii", type=radii, metavar="A,B", help="to try, beside 0 (default: the recipe's search, else 0.03 to 2)"
    )
    radius.add_argument("--norm", choices=("l2", "rms"), help="of the ball (default: the recipe's)")
    radius.add_argument(
        "--space", choices=("pixel01", "pixel11", "latent", "reward_input"), help="of the ball (default: the recipe's)"
    )
    compared = radius.add_mutually_exclusive_group()
    for name, text in (
        ("parameter", "compare gradients of the trained weights (default)"),
        ("latent", "compare gradients at the decoder's latent"),
        ("image", "compare gradients at the pixels, the cheapest"),
    ):
        compared.add_argument(f"--{name}", dest="gradients", action="store_const", const=name, help=text)
    radius.add_argument("--pictures", type=positive, metavar="N", help="to compare on (default: 64)")
    radius.add_argument("--checkpoint", type=path, metavar="RUN", help="a run folder: its newest weights")
    radius.add_argument("--output", type=path, metavar="FOLDER", help="default: radius, or the next free one")

    add("doctor", "say what runs on this machine, and why", texts.DOCTOR)
    helper = add("help", "say what a command takes", "The same as COMMAND --help.\n")
    helper.add_argument("topic", nargs="?", metavar="COMMAND", help="default: the whole")
    return parser


def _add_pictures(command: argparse.ArgumentParser) -> None:
    """Pictures, their prompts, and what looks at them."""
    command.add_argument(
        "pictures", nargs="+", type=path, metavar="PICTURES", help="folders of pictures, or single files"
    )
    command.add_argument("--prompts", type=place, metavar="FILE", help="a file or set, as sample's --prompts-file")
    _add_reward(command)


def _add_reward(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="NAME=PATH[,key=value]",
        help="once for each reward; or a recipe's file",
    )


def _add_sampling(command: argparse.ArgumentParser) -> None:
    command.add_argument("--steps", type=positive, metavar="N", help="network calls (default: the run's, or as above)")
    command.add_argument("--guidance", type=float, metavar="W", help="guidance scale (default: the run's, or as above)")
    command.add_argument("--eta", type=float, metavar="X", help="DDIM's noise, 0 to 1 (default: the run's, else 0)")
    command.add_argument("--height", type=positive, metavar="PIXELS", help="default: the run's, else the pipeline's")
    command.add_argument("--width", type=positive, metavar="PIXELS", help="default: the run's, else the pipeline's")
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: the run's, else fp32")


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def _add_batch_size(command: argparse.ArgumentParser) -> None:
    command.add_argument("--batch-size", type=positive, default=8, metavar="N", help="pictures at a time (default: 8)")


def parse_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse a command line with the parser that `build_parser` made.

    Raises:
        UserError: no such command, or an option that it does not take; it says which was meant.
        SystemExit: after --help, --version or a value that is wrong, all of which have been printed.
    """
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    name = next((argument for argument in argv if not argument.startswith("-")), None)
    if name is not None and name not in commands.choices:
        raise UserError(f"there is no command {name!r}{_near(name, commands.choices)} (see rsaft-fast --help)")
    if name in ("train", "estimate"):
        start = argv.index(name) + 1
        argv = argv[:start] + _options_last(argv[start:], commands.choices[name])
    arguments, unknown = parser.parse_known_args(argv)
    if arguments.command == "help":
        topic = arguments.topic
        if topic is not None and topic not in commands.choices:
            raise UserError(f"there is no command {topic!r}{_near(topic, commands.choices)} (see rsaft-fast --help)")
        (commands.choices[topic] if topic else parser).print_help()
        parser.exit(0)
    if unknown:
        raise UserError(_unknown(unknown, arguments.command, commands.choices[arguments.command]))
    return arguments


def _options_last(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The recipe and its keys before the options: argparse wants all of them in one piece, users mix both.

    What follows an option that takes a value, or that is not known, belongs to it, unless it is a key of the recipe.
    """
    if "--" in argv:
        return argv
    flags = [text for action in parser._actions if action.nargs == 0 for text in action.option_strings]
    words, options = [], []
    for before, argument in zip(["", *argv], argv):
        valued = before.startswith("-") and "=" not in before and not any(flag.startswith(before) for flag in flags)
        is_option = argument.startswith("-") or (valued and not _KEY.match(argument))
        (options if is_option else words).append(argument)
    return words + options


def _near(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), 1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(words)}"


def _unknown(unknown: list[str], command: str, parser: argparse.ArgumentParser) -> str:
    """What was meant by an option that the command does not have."""
    option, _, value = unknown[0].partition("=")
    options = [text for action in parser._actions for text in action.option_strings if text.startswith("--")]
    if near := difflib.get_close_matches(option, options, 1, cutoff=0.7):
        hint = f"; did you mean {near[0]}?"
    elif command in ("train", "estimate", "radius") and option.startswith("--"):
        value = value or next((word for word in unknown[1:] if not word.startswith("-")), "VALUE")
        hint = f"; a key of the recipe is written without dashes: did you mean {option[2:].replace('-', '_')}={value}?"
    else:
        hint = f" (see {parser.prog} --help)"
    return f"{command} does not take {unknown[0]!r}{hint}"


class _Parser(argparse.ArgumentParser):
    """A wrong option is wrong input like any other: one line, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"rsaft-fast: error: {message} (see {self.prog} --help)\n")


class _Help(argparse.HelpFormatter):
    """Fills paragraphs to the terminal's width; an example too long for it has its remark on a line below."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        paragraph: list[str] = []
        for line in [*text.rstrip().splitlines(), ""]:
            if line and not line.startswith("  "):
                paragraph.append(line)
                continue
            lines += _filled(" ".join(paragraph), width)
            lines += _example(line, width)
            paragraph = []
        return "\n".join(indent + line for line in lines[:-1])


def _filled(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _example(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    command, _, remark = line.strip().partition("   ")
    return [f"  {command}", *(f"      {part}" for part in _filled(remark.strip(), width - 6))]
