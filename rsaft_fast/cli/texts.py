"""What `--help` says of the whole and of each command."""

from __future__ import annotations

DESCRIPTION = """\
Fine-tunes diffusion models by reward gradient, smoothed against reward hacking (RSA-FT, arXiv 2603.21175).

  rsaft-fast demo                          watch it work in three minutes, on any machine
  rsaft-fast experiment                    does it work? over seeds, with intervals
  rsaft-fast train recipe.yaml             fine-tune your own model
  rsaft-fast report RUN                    see what it learned, and whether it hacked: one HTML page
  rsaft-fast compare RUN RUN               runs side by side
  rsaft-fast sample --run RUN              look at what came out
  rsaft-fast score PICTURES --reward R=P   what reward models say of pictures
  rsaft-fast eval RUN --prompts FILE       is it better than it was, by rewards that were not trained on
  rsaft-fast ab BEFORE AFTER               which of two sets people prefer, asked blindly
  rsaft-fast sharpness PICTURES ...        how much a reward falls right beside a picture
  rsaft-fast push RUN --repo OWNER/NAME    publish it on the hub, with a model card
  rsaft-fast serve --reward R=P            reward models for other processes, over HTTP
  rsaft-fast convert FILE FOLDER           a reward's published pickle as safetensors, once
  rsaft-fast estimate recipe.yaml          will it fit, and what would make it fit
  rsaft-fast radius RECIPE --judges R=P    which image radius to smooth with, or none
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
  rsaft-fast train my.yaml method.name=drtune method.k=3            another method, with its own keys: refl, draft,
                                                                    draft_lv, alignprop, drtune, leapalign,
                                                                    flowbp_sparse, flowbp_bridge, flowbp_lagrange,
                                                                    flow_grpo, nft, python
  rsaft-fast train my.yaml resume=auto                              go on where output_dir stopped, or start
  rsaft-fast train my.yaml resume=runs/a max_steps=400              go on with that run
  torchrun --nproc-per-node 8 -m rsaft_fast train my.yaml           the same run on eight GPUs
  rsaft-fast train --help-config                                    every key, its default and what it does
  rsaft-fast train --help-config optimizer                          the keys of one section, or one key

The run folder holds metrics.jsonl (one object an update), config.yaml as resolved, samples/, tensorboard/,
checkpoints/, and in the end lora/ (or the whole denoiser) for diffusers, and report.html, which shows all of it.
Ctrl-C and SIGTERM finish the update, save, and exit with 130 and 143; a second Ctrl-C exits at once. Something wrong
with the input exits with 2.
"""

REPORT = """\
Show a run, several runs or an experiment in one HTML file that holds all it needs: curves to zoom into, held-out
rewards against the trained one, pictures with a slider over the updates, alarms, S1, time and memory by phase, recipe
and versions. It opens without a network, on a phone, in dark mode, by keyboard; without scripts it shows pictures.

examples:
  rsaft-fast report runs/a                              runs/a/report.html, which train writes at its end, too
  rsaft-fast report runs/a runs/b -o both.html          two runs, in two colours
  rsaft-fast report runs/demo                           every run in that folder
  rsaft-fast report benchmarks/results/playground/experiment -o experiment.html

How to read it. The trained reward rises in every run that learns, hacked or not. Look at what was held out: where it
falls while the trained reward rises, the reward is being hacked, and the curve of one against the other bends down. At
equal trained reward, the run with the higher held-out one is better. A run still going may be looked at as well.
"""

COMPARE = """\
Set runs side by side: prints what each changed, draws the demo's picture of them (before, then each run's newest
pictures, curves beside), and writes the report of all.

examples:
  rsaft-fast compare runs/plain runs/smoothed
  rsaft-fast compare runs/plain runs/smoothed runs/lora -o runs/three

Their sample grids show the same prompts and noise where samples and seed are alike in the recipes.
"""

AB = """\
Make a page on which people say which of two pictures they prefer without knowing which is whose: pairs of the same
prompt and seed, in random order, sides at random. It is one HTML file, to be sent to whoever should judge; answers
stay in their browser until they export a CSV. The page ends with who is preferred and the 95 % interval (Wilson's) of
the share; --read counts the exported answers of everybody together.

examples:
  rsaft-fast sample --run runs/a --prompts-file drawbench --untrained --output before
  rsaft-fast sample --run runs/a --prompts-file drawbench --output after
  rsaft-fast ab before after -o ab.html
  rsaft-fast ab runs/plain runs/smoothed                two runs: the newest pictures of their sample grids
  rsaft-fast ab --read anna.csv ben.csv                 what they said

Keys: left and right arrow choose, down arrow cannot tell, Backspace goes back. The interval counts pairs as
independent: give many prompts rather than many pictures of a few.
"""

SAMPLE = """\
Draw pictures with this project's sampler, from a pipeline as it is or with what a run trained.

Before and after: the run's own pipeline, sampler, size and dtype, without and with its training.

examples:
  rsaft-fast sample playground --prompts "a red circle left of a blue square" --seeds 0 1 2
  rsaft-fast sample --run runs/playground --prompts-file playground --output after
  rsaft-fast sample --run runs/playground --prompts-file playground --output before --untrained
  rsaft-fast sample --run runs/playground --prompts-file playground --checkpoint 40
  rsaft-fast sample --run runs/playground --prompts-file playground --checkpoint best
  rsaft-fast sample path/to/sd3 --lora runs/a/lora --prompts-file prompts.txt --steps 28 --guidance 4.5

Without --run, steps and guidance are those of diffusers' pipelines, or of the model's authors: SD1.5 50 and 7.5, SDXL
50 and 5, SD3 28 and 7, SD3.5 28 and 4.5, FLUX.1-dev 28 and 3.5, FLUX.1-schnell 4 and none, FLUX.2-dev and -klein-base
50 and 4, FLUX.2-klein 4 and none, Z-Image 50 and 6 (its own pipeline calls this 5), Z-Image-Turbo 8 and none,
Qwen-Image 50 and 4, Krea-2 28 and 5.5 (its own pipeline calls this 4.5), Krea-2-Turbo 8 and none.

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

EVAL = """\
Compare a model with what was trained from it, on prompts, by rewards that were not trained on: draw the same prompts
from the same noise with each, score every picture, and print a table with 95 % intervals, each model's paired
difference to the first, and how far its pictures have moved.

examples:
  rsaft-fast eval runs/playground                                        the playground's held-out scenes, and r*
  rsaft-fast eval runs/a --prompts my.txt --rewards imagereward=THUDM/ImageReward clip=openai/clip-vit-large-patch14
  rsaft-fast eval runs/plain runs/smoothed --prompts my.txt --rewards imagereward=PATH     base, + method, + RSA-FT
  rsaft-fast eval runs/plain runs/smoothed --checkpoint all --prompts my.txt               and at equal trained reward
  rsaft-fast eval runs/a --protocol drawbench --rewards imagereward=PATH --features facebook/dinov2-large
  rsaft-fast eval runs/a --protocol geneval=tasks.jsonl --rewards geneval-hf=PATH,metadata=tasks.jsonl,credit=benchmark
  rsaft-fast eval path/to/sd15 path/to/other --prompts my.txt --rewards pickscore=PATH     models without any run

The first row is the runs' own pipeline, untrained. The reward that a run was trained on is always measured and has a
star: it rises whether or not the pictures are better. S1 says how much a reward falls right beside the pictures. FID
and KID are distances to the first row's pictures, and diversity is the mean cosine distance between pictures, all in
features of --features; without it in small thumbnails, on the playground in those of a shipped reward.

With --checkpoint all every kept checkpoint is drawn, and runs are compared where the trained reward first reaches the
highest level that all of them reach: the ends of two runs do not compare where one has climbed further.

Steps, guidance, size and dtype are those of the first run named, for all of them; without a run those that sample takes
without one. A picture depends on its prompt's text, its seed and the model, not on other prompts. Everything is kept in
--output: after Ctrl-C, a kill or an error the same command goes on, to the same figures; more rewards, runs or
checkpoints cost what they add. Writes evaluation.md (the table), scores.csv (a row a picture) and evaluation.json (all
figures, and every choice behind them: prompts, seeds, sampler, hashes of the weights, versions), marked as partial
until all is measured. Scores are those of `rsaft-fast score` on the same folder.
"""

SHARPNESS = """\
Say how sharp reward models are at pictures: S1, how much a reward falls at the worst picture within a ball around each
one. High S1 at a radius that nobody sees means that the reward can be climbed there without a better picture. It is
measured by one step against the gradient (eq. 10 of RSA-FT, arXiv 2603.21175) and by a search within the ball
(projected gradient descent), which is never lower: the gap says how far one step can be trusted.

examples:
  rsaft-fast sharpness samples --reward hpsv2.1=xswu/HPSv2 --radius 0.3 1 3
  rsaft-fast sharpness samples --reward pickscore=PATH --norm rms --radius 0.001 0.004     radii that hold for any size
  rsaft-fast sharpness samples --reward pickscore=PATH --steps 100 --restarts 4             a longer search
  rsaft-fast sharpness samples --reward pickscore=PATH --space latent --pipeline path/to/sd3
  rsaft-fast sharpness samples --reward pickscore=PATH --with-reward imagereward=PATH       does S1 tell that one?

Pictures and prompts are read as score reads them. Writes a CSV with a row a picture, a JSON file with means, quantiles,
the gap and S1 over the reward's own spread between pictures, and a PNG of S1 against the radius. Figures wait in
OUTPUT.partial until then: after a failure or Ctrl-C, the same command goes on from there. A radius, picture and step of
the search costs a forward and backward pass of the reward.
"""

PUSH = """\
Publish what a run trained on the Hugging Face hub: its LoRA (or its denoiser) and a model card that says what it is of,
which reward, method and radii made it, what it scores by rewards that it was not trained on, and under which licence.
Nothing is sent before you name the repository; --dry-run shows what would be.

examples:
  rsaft-fast push runs/a --repo me/sd15-rsaft --dry-run
  rsaft-fast push runs/a --repo me/sd15-rsaft --private
  rsaft-fast push runs/a --repo me/sd15-rsaft --checkpoint best --license creativeml-openrail-m
  rsaft-fast push runs/a --repo me/sd15-rsaft --evaluation runs/a/evaluation/drawbench

Log in first (hf auth login, or HF_TOKEN), with a token that may write. The scores are those that `rsaft-fast eval`
found of the same weights. The licence of the base model binds you; where it is not known here, --license must say it.
Of local paths only the last name is shown.
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
RSA-FT, from the same seeds; print what the proxy reward, the true preference and the sharpness did, draw it, and write
one page, report.html, with curves to zoom into and a slider over the updates. Two CPU cores are enough: under three
minutes.

examples:
  rsaft-fast demo
  rsaft-fast demo --proxy fair --steps 60 --seed 1 --output runs/fair
"""

EXPERIMENT = """\
Fine-tune the playground's pipeline many times, plain and smoothed and by what else one would try, and compare what
came out with the true preference r*, over seeds: best r*, r* at the end, r* at equal proxy reward, each as a paired
difference to plain with its 95 % interval; and what the sharpness S1 says of r*.

Each run is a process of its own on one core, or on a GPU. A finished run is one JSON file with every picture's values,
and is not run again; killed and started again, the command goes on.

examples:
  rsaft-fast experiment                                   a small table, within ten minutes on two cores
  rsaft-fast experiment --list                            every set and run, done or not
  rsaft-fast experiment --full --budget 120               all sets, for two hours; then the same again
  rsaft-fast experiment --set select --set core           radii chosen on some seeds, reported on others
  rsaft-fast experiment --set core --seeds 20 21 22       other seeds
  rsaft-fast experiment --set core --proxies brittle      one reward
  rsaft-fast experiment --report --page docs/does-it-work.md
  rsaft-fast experiment --set counting --jobs 2           policy gradients and GARDO, for a proxy that is hacked
  rsaft-fast experiment --set counting --report --page docs/gardo.md

Results lie in benchmarks/results/playground/experiment of a checkout, else in runs/experiment; those of --quick in
runs/quick-experiment. What was made is written between <!-- experiment:begin --> and <!-- experiment:end --> of a page.
What it is, and what it cannot show: docs/does-it-work.md and, of counting, docs/gardo.md.
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
  rsaft-fast estimate my.yaml --gpus 8                              the peak of one of eight that share the run
  rsaft-fast estimate my.yaml --quick                               the table alone, in a third of the time
  rsaft-fast estimate my.yaml --json | jq .peak                     bytes, for scripts

The first part of the table is what stands throughout training. The second has every phase of an update at its own
peak: what the phase itself brings, what stands beside it at that moment, and the sum. The largest sum is the run's
peak, which torch.cuda.max_memory_allocated() will show. Then it says which keys lower that phase, each tried by
estimating again. Shapes come from the config files of the pipeline and of the reward; where a hub id is not on this
machine, from the published architecture of that name, and it says so.
"""

RADIUS = """\
Find the image radius to smooth with, and whether smoothing helps this reward at all, before any training: the gradient
of the recipe's reward, at the picture and smoothed with each radius, is compared with the gradients of other rewards,
the judges, on the same pictures. Where the smoothed gradient agrees better with theirs than the plain one does,
smoothing helps. A minute on a small model; in general as long as (radii + judges) updates of --pictures pictures.

examples:
  rsaft-fast radius playground.yaml reward.path=playground/brittle --judges playground/fair
  rsaft-fast radius my.yaml --judges imagereward=THUDM/ImageReward clipscore=openai/clip-vit-large-patch14
  rsaft-fast radius my.yaml --judges a:clip=judge_a b:clip=judge_b mine:python:rewards:colour --radii 0.1,0.3,1,3
  rsaft-fast radius my.yaml --judges imagereward=PATH --image --pictures 256      the pixels' gradients, cheaper
  rsaft-fast radius my.yaml --judges imagereward=PATH --space latent --radii 0.3,1,3   another ball; compare heights
  rsaft-fast radius runs/a/config.yaml --checkpoint runs/a --judges imagereward=PATH   does it still help there?

The table has each judge's cosine with its standard error (a jackknife over groups of pictures), and in the last column
that with the reward's own plain gradient. A radius is taken where the mean over the judges gains over the plain
gradient by more than the 95 % interval, no judge clearly loses, and the reward itself is still climbed: in a large ball
nothing is left of it but the wish to be flat. The trained reward itself, and two judges with nearly one gradient, are
warned of. Writes radius.json and radius.png into --output. In a recipe, smoothing.image.radius=auto does the same
before the first update.
"""

DOCTOR = """\
Say which versions, devices and backends are here, what will run, and what to change.

example:
  rsaft-fast doctor
"""
