"""The command line. Parsing needs nothing but the standard library, so that `--help` is immediate."""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import re
import signal
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress

from rsaft_fast import __version__
from rsaft_fast.errors import UserError, printable
from rsaft_fast.paths import require_text, user_path, user_place

_KEY = re.compile(r"[A-Za-z_][\w.]*=")

DESCRIPTION = """\
Fine-tunes diffusion models by reward gradient, smoothed against reward hacking (RSA-FT, arXiv 2603.21175).

  rsaft-fast demo                          watch it work in three minutes, on any machine
  rsaft-fast train recipe.yaml             fine-tune your own model
  rsaft-fast sample --run RUN              look at what came out
  rsaft-fast score PICTURES --reward R=P   what reward models say of pictures
  rsaft-fast serve --reward R=P            reward models for other processes, over HTTP
  rsaft-fast convert FILE FOLDER           a reward's published pickle as safetensors, once
  rsaft-fast estimate recipe.yaml          will it fit, and what would make it fit
  rsaft-fast bench                         how fast the SAM step is here, beside what others use
  rsaft-fast doctor                        what runs on this machine, and why
  rsaft-fast help COMMAND                  what a command takes, with examples
"""

TRAIN = """\
Fine-tune as a recipe says. Keys on the command line replace the recipe's. Where a key holds text, the value is taken
as typed; elsewhere it is YAML.

examples:
  rsaft-fast train playground.yaml                                  a shipped recipe, by name
  rsaft-fast train my.yaml max_steps=200 output_dir=runs/a seed=1   three keys replaced
  rsaft-fast train my.yaml smoothing=null                           the same method without smoothing
  rsaft-fast train my.yaml method.name=drtune method.k=3            another method, with its own keys
  rsaft-fast train my.yaml resume=auto                              go on where output_dir stopped, or start
  rsaft-fast train my.yaml resume=runs/a max_steps=400              go on with that run
  rsaft-fast train --help-config                                    every key, its default and what it does
  rsaft-fast train --help-config optimizer                          the keys of one section, or one key

The run folder holds metrics.jsonl (one object an update), config.yaml as resolved, samples/, tensorboard/,
checkpoints/, and in the end lora/ (or the whole denoiser) for diffusers. Ctrl-C and SIGTERM finish the update,
save, and exit with 130 and 143; a second Ctrl-C exits at once. Something wrong with the input exits with 2.
"""

SAMPLE = """\
Draw pictures with this project's sampler, from a pipeline as it is or with what a run trained.

Before and after: the run's own pipeline, sampler, size and dtype, without and with its training.

examples:
  rsaft-fast sample playground --prompts "a red circle left of a blue square" --seeds 0 1 2
  rsaft-fast sample --run runs/playground --prompts-file playground --output after
  rsaft-fast sample --run runs/playground --prompts-file playground --output before --untrained
  rsaft-fast sample --run runs/playground --prompts-file playground --checkpoint 40
  rsaft-fast sample path/to/sd3 --lora runs/a/lora --prompts-file prompts.txt --steps 28 --guidance 4.5

Without --run, steps and guidance are those of diffusers' pipelines, or of the model's authors: SD1.5 50 and 7.5, SDXL
50 and 5, SD3 28 and 7, SD3.5 28 and 4.5, FLUX.1-dev 28 and 3.5, FLUX.1-schnell 4 and none.

A picture depends on its prompt and seed alone. Writes one PNG a picture, grid.png and pictures.json into --output.
"""

SCORE = """\
Score pictures with reward models, each from its own published file: a table, a CSV with a row a picture, and beside it
a JSON file with what produced the scores (file hash, preprocessing, scale).

examples:
  rsaft-fast score samples --reward hpsv2.1=xswu/HPSv2 --reward pickscore=yuvalkirstain/PickScore_v1
  rsaft-fast score a.png b.jpg --prompts prompts.txt --reward imagereward=weights/ImageReward.pt
  rsaft-fast score before after --reward hpsv2=HPS_v2_compressed.pt,scale=percent,resize=legacy_noaa    is it better?
  rsaft-fast score pictures --prompts one.txt --reward aesthetic=head.pth,image_tower=path/to/clip-l
  rsaft-fast score samples --reward remote=http://127.0.0.1:8765/hpsv3          a server's (rsaft-fast serve)
  rsaft-fast score samples --reward recipe.yaml                                 the reward section of a recipe
  rsaft-fast score reference --reward pickscore=PATH --reward hpsv2.1=PATH --calibration scales.json

Prompts come from --prompts: one a picture, in natural order of the names (2.png before 10.png), or one a picture of
every folder, or a single one for all; else from the pictures.json that `rsaft-fast sample` leaves. Which prompt went to
which picture, and what of a folder was passed over, is said. Of two or more folders each is compared with the first,
pair by pair (the same prompt and seed where pictures.json has them, else the same name, else the same prompt in order):
mean difference, its 95 % interval by Student's t over the prompts, how often it scores higher, and in words what
follows.

Scores wait in OUTPUT.partial until the table is written: after a failure, a full disk or Ctrl-C, the same command goes
on from there. Keys behind a reward's path are those of a recipe's reward section. --calibration writes where each
reward lies on these pictures and how wide: a recipe's reward.calibration, by which a combination adds up rewards of
different scales.
"""

SERVE = """\
Serve reward models over HTTP, so that a process or environment that cannot hold them can score with them: `reward.name:
remote` in a recipe, `--reward remote=URL` for score. Pictures travel as safetensors, bit for bit, or as PNG in JSON;
never as pickles. Scores are those of a local reward. A gradient does not travel: remote rewards score, and train by
policy gradient.

examples:
  rsaft-fast serve --reward pickscore=yuvalkirstain/PickScore_v1
  rsaft-fast serve --reward hpsv2.1=xswu/HPSv2 --reward imagereward=THUDM/ImageReward --port 9000 --device cuda:1
  export RSAFT_SERVER_TOKEN=...                                    what the server printed, where the client runs
  rsaft-fast score samples --reward remote=http://127.0.0.1:8765/pickscore

The server listens on this machine alone unless --host says otherwise, and then warns: HTTP is not encrypted. Every
request needs the token, which RSAFT_SERVER_TOKEN gives to the server or the server prints. Requests that wait
together are scored together. Who sends nothing for 15 seconds, or a header or body too slowly, is hung up on; a prompt
longer than --max-prompt is refused. Ctrl-C and SIGTERM end it after the requests that are being scored.

Clients wait two minutes for a server that restarts (reward.patience). Their token is read from a variable that begins
with RSAFT_, and they warn when it travels unencrypted to another machine.
"""

CONVERT = """\
Write a reward's published pickle as safetensors, once: it then loads faster, and holds nothing that could run. The
pickle is read for tensors alone (weights_only); one that holds more is refused, and nothing in it runs. Names, values
and dtypes stay, so every score stays the same to the bit; what is written is read back and compared. The header
records the pickle's SHA-256, which results and calibrations keep naming.

examples:
  rsaft-fast convert HPS_v2.1_compressed.pt rewards/hpsv2.1 --reward hpsv2.1
  rsaft-fast convert THUDM/ImageReward rewards/imagereward --reward imagereward     med_config.json goes along
  rsaft-fast convert sac+logos+ava1-l14-linearMSE.pth rewards/aesthetic --reward aesthetic
  rsaft-fast convert path/to/clip rewards/clip --reward clip                        a folder with pytorch_model.bin
  rsaft-fast score samples --reward hpsv2.1=rewards/hpsv2.1                         then

The folder is made if need be. Files in it that would be replaced stop the command, unless --force is given.
"""

DEMO = """\
Fine-tune the shipped tiny pipeline on scenes whose true preference is known exactly, with DRaFT-1 plain and with
RSA-FT, from the same seeds; print what the proxy reward, the true preference and the sharpness did, and draw it.
Two CPU cores are enough: under three minutes.

examples:
  rsaft-fast demo
  rsaft-fast demo --proxy brittle --steps 60 --seed 1 --output runs/hacked
"""

BENCH = """\
Time the passes of a SAM update over the parameter lists of real models, ours beside what people use today, and show
milliseconds, GB/s (the bytes that must move, over the time), the fraction of this card's own copy bandwidth from the
same run, every provider's time over ours, launches and memory. No weights are needed. Packages that are not installed
are listed as missing. Without a GPU a tiny list runs on the CPU, and its figures mean nothing.

examples:
  rsaft-fast bench --quick                                        a look, at two models' lists
  rsaft-fast bench --results benchmarks/results --goals           everything that fits, recorded, against the goals
  rsaft-fast bench --cases sdxl-full --dtypes fp32,bf16           one model's list in two layouts
  rsaft-fast bench --cases sdxl-lora32 --providers ours-cuda,ours-triton,usual-fused
  rsaft-fast bench --budget 150                                   the most important first, and what was left out
  rsaft-fast bench --memory --results benchmarks/results          whole updates at real size: peaks and times
  rsaft-fast bench --list                                         every case, dtype and provider, and what runs here

Passes: norm (global gradient norm), perturb, step (restore + AdamW), update (norm, perturb, norm with clipping, step).
"""

ESTIMATE = """\
Say how much GPU memory a recipe will need, before anything is downloaded, loaded or allocated. One update of it runs
on shapes alone, by the code that trains, while every tensor's birth and death is counted.

examples:
  rsaft-fast estimate sd15-lora-24gb.yaml                           a shipped recipe, by name
  rsaft-fast estimate my.yaml data.batch_size=1                     keys replaced, as for train
  rsaft-fast estimate my.yaml backbone.checkpoint=[]                what checkpointing saves
  rsaft-fast estimate my.yaml --card 12                             will it fit into a card with 12 GB
  rsaft-fast estimate my.yaml --quick                               the table alone, in a third of the time
  rsaft-fast estimate my.yaml --json | jq .peak                     bytes, for scripts

The first part of the table is what stands throughout training. The second has every phase of an update at its own
peak: what the phase itself brings, what stands beside it at that moment, and the sum. The largest sum is the run's
peak, which torch.cuda.max_memory_allocated() will show. Then it says which keys lower that phase, each tried by
estimating again. Shapes come from the config files of the pipeline and of the reward; where a hub id is not on this
machine, from the published architecture of that name, and it says so.
"""

DOCTOR = """\
Say which versions, devices and backends are here, what will run, and what to change.

example:
  rsaft-fast doctor
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="rsaft-fast", description=DESCRIPTION, formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"rsaft-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, summary: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=text, formatter_class=_Help)

    train = add("train", "fine-tune as a recipe says", TRAIN)
    train.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file, or the name of a shipped recipe")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace the recipe's")
    train.add_argument(
        "--help-config",
        nargs="?",
        const="",
        metavar="KEY",
        help="print every key (or KEY, and those below it), its default and what it does",
    )

    demo = add("demo", "see plain fine-tuning and RSA-FT side by side on the embedded playground", DEMO)
    demo.add_argument("--steps", type=_positive, metavar="N", help="updates of each run (default: the recipe's)")
    demo.add_argument("--seed", type=_natural, default=0, metavar="N", help="of both runs (default: 0)")
    demo.add_argument("--proxy", choices=("fair", "brittle"), default="fair", help="which proxy reward (default: fair)")
    demo.add_argument(
        "--output", type=_path, metavar="FOLDER", help="where it writes (default: runs/demo, or the next free one)"
    )

    sample = add("sample", "draw pictures with a pipeline or a run", SAMPLE)
    sample.add_argument(
        "pipeline",
        nargs="?",
        type=_place,
        metavar="PIPELINE",
        help="folder in diffusers' format, hub id, or playground (default: the run's)",
    )
    trained = sample.add_mutually_exclusive_group()
    trained.add_argument(
        "--run", type=_path, metavar="FOLDER", help="a run folder: its newest checkpoint and its sampler settings"
    )
    trained.add_argument("--lora", type=_path, metavar="PATH", help="a LoRA in diffusers' format, file or folder")
    sample.add_argument("--untrained", action="store_true", help="with --run: its settings, without its training")
    sample.add_argument("--checkpoint", type=_natural, metavar="STEP", help="with --run: the weights of that step")
    prompts = sample.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="prompts, each in quotes")
    prompts.add_argument(
        "--prompts-file",
        type=_place,
        metavar="FILE",
        help=".txt, .csv, .tsv, .json, .jsonl, .parquet, starter, playground, or a set: drawbench, hpdv2, hpdv2-photo, "
        "partiprompts, geneval, ocr, pickapic, or NAME=PATH",
    )
    sample.add_argument(
        "--seeds", nargs="+", type=_natural, default=[0], metavar="N", help="a picture each (default: 0)"
    )
    sample.add_argument("--steps", type=_positive, metavar="N", help="network calls (default: the run's, or as above)")
    sample.add_argument("--guidance", type=float, metavar="W", help="guidance scale (default: the run's, or as above)")
    sample.add_argument("--negative", metavar="TEXT", help="negative prompt (default: the run's, else none)")
    sample.add_argument("--eta", type=float, metavar="X", help="DDIM's noise, 0 to 1 (default: the run's, else 0)")
    sample.add_argument("--height", type=_positive, metavar="PIXELS", help="default: the run's, else the pipeline's")
    sample.add_argument("--width", type=_positive, metavar="PIXELS", help="default: the run's, else the pipeline's")
    sample.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: the run's, else fp32")
    sample.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    sample.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="pictures at a time (default: 8)")
    sample.add_argument("--output", type=_path, metavar="FOLDER", help="default: samples, or the next free one")

    score = add("score", "score pictures with reward models", SCORE)
    score.add_argument(
        "pictures", nargs="+", type=_path, metavar="PICTURES", help="folders of pictures, or single files"
    )
    score.add_argument("--prompts", type=_place, metavar="FILE", help="a file or set, as sample's --prompts-file")
    score.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="NAME=PATH[,key=value]",
        help="once for each reward; or a recipe's file",
    )
    score.add_argument(
        "--calibration", type=_path, metavar="FILE", help="also write each reward's centre and width to this file"
    )
    score.add_argument(
        "--output", default="scores.csv", type=_path, metavar="FILE", help="new CSV (default: scores.csv)"
    )
    score.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    score.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="pictures at a time (default: 8)")

    serve = add("serve", "serve reward models to other processes, over HTTP", SERVE)
    serve.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="NAME=PATH[,key=value]",
        help="once for each reward; or a recipe's file",
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=_natural, default=8765, metavar="N", help="0 takes a free one (default: 8765)")
    serve.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    serve.add_argument(
        "--max-pictures", type=_positive, default=64, metavar="N", help="of a request and of a call (default: 64)"
    )
    serve.add_argument(
        "--max-bytes", type=_positive, default=256 * 2**20, metavar="N", help="of a request (default: 268435456)"
    )
    serve.add_argument(
        "--max-prompt", type=_positive, default=10_000, metavar="N", help="characters of a prompt (default: 10000)"
    )
    serve.add_argument("--timeout", type=_positive, default=300, metavar="S", help="of a request (default: 300)")

    convert = add("convert", "write a reward's pickle as safetensors", CONVERT)
    convert.add_argument("source", type=_place, metavar="SRC", help="what reward.path would be: file, folder or hub id")
    convert.add_argument("folder", type=_path, metavar="DST", help="folder to write into")
    convert.add_argument("--reward", required=True, metavar="NAME", help="the family, such as hpsv2.1")
    convert.add_argument("--force", action="store_true", help="replace files that are there")

    bench = add("bench", "time the SAM step on this machine, beside what others use", BENCH)
    bench.add_argument("--cases", metavar="A,B", help="parameter lists, images, host (default: all that fit)")
    bench.add_argument("--dtypes", metavar="A,B", help="of fp32, bf16 (with an fp32 master), 8bit (default: all)")
    bench.add_argument("--providers", metavar="A,B", help="who is measured (default: all that are installed)")
    bench.add_argument("--results", type=_path, metavar="FOLDER", help="write FOLDER/<gpu>/<date>.json, row by row")
    bench.add_argument("--quick", action="store_true", help="two models' lists, five calls instead of twenty")
    bench.add_argument("--budget", type=_positive, metavar="SECONDS", help="begin nothing new after this long")
    bench.add_argument("--goals", action="store_true", help="also show the project's goals, and which are met")
    bench.add_argument("--memory", action="store_true", help="whole updates instead: --cases names runs of that list")
    bench.add_argument("--list", action="store_true", help="show the cases, dtypes and providers, and end")

    estimate = add("estimate", "say how much memory a recipe needs, before anything loads", ESTIMATE)
    estimate.add_argument("recipe", metavar="RECIPE", help="YAML file, or the name of a shipped recipe")
    estimate.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace the recipe's")
    estimate.add_argument("--quick", action="store_true", help="do not look for keys that would lower the peak")
    estimate.add_argument(
        "--card", type=_gigabytes, metavar="GB", help="memory of the card to compare with (default: the one here)"
    )
    estimate.add_argument("--json", action="store_true", help="print one JSON object, in bytes")

    add("doctor", "say what runs on this machine, and why", DOCTOR)
    helper = add("help", "say what a command takes", "The same as COMMAND --help.\n")
    helper.add_argument("topic", nargs="?", metavar="COMMAND", help="default: the whole")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, 2 when the input or the disk is wrong, 130 or 143 when a signal stopped it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _say_all_characters()
    command = ""
    try:
        for argument in argv:
            _require_text(argument)
        try:
            arguments = _parse(build_parser(), argv or ["--help"])
        except SystemExit:  # of --help and --version
            _flush_output()
            raise
        command = arguments.command
        code = _run(arguments)
        _flush_output()
        return code
    except UserError as error:
        _say_error(str(error))
        return 2
    except KeyboardInterrupt as interrupt:
        kept = "; a run's newest complete checkpoint stays (resume=auto)" if command in ("train", "demo") else ""
        print(f"rsaft-fast: interrupted at once{kept}", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", signal.SIGINT)
    except BrokenPipeError:
        # The reader (head, less) has gone; what it wanted to see, it saw.
        _drop_output()
        return 0
    except OSError as error:
        from rsaft_fast.files import describe_io_error, mend_of

        _drop_output()
        with suppress(OSError):  # standard error may be on the same full disk
            _say_error(f"{describe_io_error(error)}; {mend_of(error)}")
        return 2


def _say_error(text: str) -> None:
    for line in text.split("\n"):
        print(f"rsaft-fast: error: {printable(line)}", file=sys.stderr)


def _flush_output() -> None:
    """Write out what was printed: what a full disk does not take is found here, and not at the interpreter's end."""
    try:
        print(end="", flush=True)
    except OSError as error:
        error.filename = error.filename or "standard output"
        raise


def _drop_output() -> None:
    """Let go of what standard output does not take; the interpreter would try it again at its end, and exit by 120."""
    try:
        print(end="", flush=True)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _say_all_characters() -> None:
    """A terminal or file that lacks a character (`±` in ASCII) gets its number: no work is lost for want of it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _require_text(argument: str) -> None:
    try:
        require_text(argument)
    except ValueError as error:
        raise UserError(f"the argument {argument[:60]!r}: {error}") from error


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
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


def _near(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, list(words), 1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(words)}"


def _unknown(unknown: list[str], command: str, parser: argparse.ArgumentParser) -> str:
    """What was meant by an option that the command does not have."""
    option, _, value = unknown[0].partition("=")
    options = [text for action in parser._actions for text in action.option_strings if text.startswith("--")]
    if near := difflib.get_close_matches(option, options, 1, cutoff=0.7):
        hint = f"; did you mean {near[0]}?"
    elif command in ("train", "estimate") and option.startswith("--"):
        value = value or next((word for word in unknown[1:] if not word.startswith("-")), "VALUE")
        hint = f"; a key of the recipe is written without dashes: did you mean {option[2:].replace('-', '_')}={value}?"
    else:
        hint = f" (see {parser.prog} --help)"
    return f"{command} does not take {unknown[0]!r}{hint}"


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "train" and arguments.recipe is None and arguments.help_config is None:
        raise UserError("train needs a recipe: rsaft-fast train RECIPE.yaml [key=value ...]")
    from rsaft_fast.commands.process import prepare_process

    prepare_process(quieten=arguments.command != "bench")
    command = importlib.import_module(f"rsaft_fast.commands.{arguments.command}")
    if arguments.command == "train" and arguments.help_config is not None:
        return command.print_keys(arguments.help_config)
    return command.run(arguments)


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


def _path(text: str) -> str:
    return _checked(user_path, text)


def _place(text: str) -> str:
    return _checked(user_place, text)


def _checked(reader, text: str) -> str:
    try:
        return reader(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: {error}") from None


def _gigabytes(text: str) -> float:
    try:
        value = float(re.sub(r"(?i)\s*gi?b$", "", text.strip()))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a number of GB, such as 12") from None
    if not 1 <= value <= 10_000:
        raise argparse.ArgumentTypeError(f"{text[:60]} GB; it must be from 1 to 10000")
    return value


def _natural(text: str) -> int:
    return _integer(text, 0)


def _positive(text: str) -> int:
    return _integer(text, 1)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is too small; it must be at least {least}")
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text[:60]} is too large; it must be below 2**63")
    return value


if __name__ == "__main__":
    sys.exit(main())
