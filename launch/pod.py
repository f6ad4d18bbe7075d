"""Real fleets: makes machines, runs a command on all of them, starts it again when they were taken away, and deletes them.

    python -m launch.pod babysit --where=queued --machine=v5e-64 --name=rad --zone=ZONE --spot --bucket=BUCKET --dry_run \\
        -- launch.train --config=configs/stage3.py:v5e-64 --data=/mnt/rad/corpus --base=/mnt/rad/runs/stage2 --workdir=/mnt/rad/runs/stage3
    python -m launch.pod run --where=gke --machine=v5e-256x2 --name=rad --image=IMAGE --bucket=BUCKET -- launch.train ...
    python -m launch.pod render --where=slurm --machine=h100-8x4 --name=rad -- launch.train ...

places
  tpu-vm   a TPU VM slice, at once or not at all (gcloud)
  queued   the same by a queued resource, when there is room (gcloud)
  gke      a JobSet on a cluster that kubectl reaches, one slice or several ("v5e-256x2")
  xpk      the same by xpk, which makes the JobSet, on --cluster
  slurm    GPUs, a process each ("h100-8x4": four nodes)

actions
  create, setup, run, delete   one after another; gke and slurm know run and delete, xpk setup too, which attaches the bucket, once
  babysit  create, setup and run; again when the machines were taken away or the command ended with 42; until it ends with 0, or with 2,
           which is for people to mend; --creates in a row without machines end it too
  render   prints the file that gke or slurm is given

--dry_run prints every command and runs none. Every process gets --multihost. --bucket is mounted at --mount, where all processes see
corpus, bases and workdir alike. launch/README.md goes from nothing to a running stage 3.
"""

import json
import shlex
import string
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags

from configs import hardware
from rad_jax import chips, distributed, errors
from rad_jax.errors import UserError

PODS = Path(__file__).parent / "pods"
PLACES = ("tpu-vm", "queued", "gke", "xpk", "slurm")
GIVE_UP, _SOON_SECONDS = 5, 300.0
_LONGEST_WAIT = 600.0  # between two creates
ACTIONS = ("create", "setup", "run", "babysit", "delete", "render")


@dataclass(frozen=True)
class Generation:
    """How Google Cloud names a generation: of TPU VMs the accelerator's prefix and the software, of GKE the node label.

    whole: chips of the largest slice that is one host. A larger one has hosts of four.
    """

    prefix: str
    software: str
    label: str
    whole: int


GENERATIONS = {
    "v4": Generation("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", 4),
    "v5e": Generation("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 8),
    "v5p": Generation("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", 4),
    "v6e": Generation("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", 8),
}


@dataclass(frozen=True)
class Machine:
    """One of configs/hardware.py, as it is rented. TPUs: slices, and hosts of a slice. GPUs: one slice, whose hosts are nodes."""

    name: str
    slices: int
    hosts: int
    chips_per_host: int
    slice: chips.Slice | None

    @classmethod
    def find(cls, name: str) -> "Machine":
        """Raises UserError when there is none of this name."""
        kind, _, times = name.partition("x")
        if kind not in hardware.MACHINES or (times and not times.isdecimal()):
            raise UserError(
                f"--machine={name} is unknown: choose {', '.join(hardware.MACHINES)}, or several: v5e-64x2."
            )
        found, count = hardware.MACHINES[kind], int(times or 1)
        generation = GENERATIONS.get(kind.split("-")[0])
        if generation is None:
            return cls(name, 1, count, found.data * found.fsdp * found.tensor, None)
        place = chips.find(kind)
        per_host = place.chips if place.chips <= generation.whole else 4
        return cls(name, count, place.chips // per_host, per_host, place)

    @property
    def generation(self) -> Generation:
        """Raises UserError for GPUs."""
        if self.slice is None:
            raise UserError(f"--machine={self.name} has no TPUs: use --where=slurm.")
        return GENERATIONS[self.slice.chip.generation]

    @property
    def accelerator(self) -> str:
        """As gcloud and xpk name a slice: v5litepod-64."""
        assert self.slice is not None
        return f"{self.generation.prefix}-{self.slice.name.split('-')[1]}"


@dataclass(frozen=True)
class Job:
    """What is to run where; `command` is a module of launch/ and its flags."""

    where: str
    name: str
    machine: Machine
    command: tuple[str, ...]
    zone: str
    project: str
    spot: bool
    bucket: str
    mount: str
    image: str
    account: str
    cluster: str
    python: str

    def processes(self) -> list[str]:
        """The command, as each process of several gets it."""
        several = self.machine.hosts * self.machine.slices > 1 or self.where == "slurm"
        return [*self.command, *(["--multihost"] if several and "--multihost" not in self.command else [])]


# ----------------------------------------------------------------------------------------------------------------------- plans

Commands = list[list[str]]


def plan(action: str, job: Job) -> Commands:
    """The commands of an action: create, setup, run or delete.

    Raises:
        UserError: the place does not know the action, or something is missing.
    """
    plans: dict[str, dict[str, Callable[[Job], Commands]]] = {
        "tpu-vm": {"create": create_vm, "setup": setup_vm, "run": run_vm, "delete": delete_vm},
        "queued": {"create": create_queued, "setup": setup_vm, "run": run_vm, "delete": delete_queued},
        "gke": {"run": run_gke, "delete": lambda job: [["kubectl", "delete", "jobset", job.name]]},
        "xpk": {"setup": setup_xpk, "run": run_xpk, "delete": delete_xpk},
        "slurm": {"run": run_slurm, "delete": lambda job: [["scancel", f"--name={job.name}"]]},
    }
    known = plans[job.where]
    if action not in known:
        raise UserError(f"--where={job.where} knows {', '.join(known)}; its machines are made by others.")
    if job.where in ("tpu-vm", "queued") and job.machine.slices > 1:
        raise UserError(f"--machine={job.machine.name} is several slices: use --where=gke or xpk.")
    if action == "run" and not job.command:
        raise UserError("nothing to run: end the line with -- launch.train and its flags.")
    return known[action](job)


def _gcloud(job: Job, *words: str) -> list[str]:
    if not job.zone:
        raise UserError("--zone is missing.")
    return ["gcloud", *words, f"--zone={job.zone}", *([f"--project={job.project}"] if job.project else [])]


def create_vm(job: Job) -> Commands:
    made = (f"--accelerator-type={job.machine.accelerator}", f"--version={job.machine.generation.software}")
    spot = ["--spot"] if job.spot else []
    return [_gcloud(job, "compute", "tpus", "tpu-vm", "create", job.name, *made, *spot)]


def create_queued(job: Job) -> Commands:
    """The request has the name of the node that it will make."""
    made = (f"--accelerator-type={job.machine.accelerator}", f"--runtime-version={job.machine.generation.software}")
    spot = ["--spot"] if job.spot else []
    return [
        _gcloud(job, "compute", "tpus", "queued-resources", "create", job.name, f"--node-id={job.name}", *made, *spot)
    ]


def setup_vm(job: Job) -> Commands:
    """The checkout as git holds it, its locked packages, and the bucket, on every host."""
    archive = f"/tmp/{job.name}.tar.gz"
    setup = ["bash", "rad/launch/pods/setup.sh", *([job.bucket, job.mount] if job.bucket else [])]
    steps = ["mkdir -p rad", "tar -xzf rad.tar.gz -C rad", shlex.join(setup)]
    return [
        ["git", "archive", "--format=tar.gz", f"--output={archive}", "HEAD"],
        _gcloud(job, "compute", "tpus", "tpu-vm", "scp", archive, f"{job.name}:rad.tar.gz", "--worker=all"),
        _ssh(job, " && ".join(steps)),
    ]


def run_vm(job: Job) -> Commands:
    cache = [f"CACHE={job.mount}/compiled"] if job.bucket else []
    words = [
        "NOTICE=gce",
        "PYTHON=.venv/bin/python",
        "PIDFILE=run.pid",
        *cache,
        "bash",
        "launch/pods/run.sh",
        *job.processes(),
    ]
    return [_ssh(job, f"cd rad && {shlex.join(words)}")]


def _ssh(job: Job, command: str) -> list[str]:
    return _gcloud(job, "compute", "tpus", "tpu-vm", "ssh", job.name, "--worker=all", f"--command={command}")


def delete_vm(job: Job) -> Commands:
    return [_gcloud(job, "compute", "tpus", "tpu-vm", "delete", job.name, "--quiet")]


def delete_queued(job: Job) -> Commands:
    return [_gcloud(job, "compute", "tpus", "queued-resources", "delete", job.name, "--force", "--quiet")]


def run_gke(job: Job) -> Commands:
    return [["kubectl", "apply", f"--filename={written(job, 'jobset.yaml', jobset(job))}"]]


def _xpk(job: Job, *words: str) -> list[str]:
    _needs(job, "cluster")
    where = {"cluster": job.cluster, "zone": job.zone, "project": job.project}
    return ["xpk", *words, *(f"--{name}={value}" for name, value in where.items() if value)]


def setup_xpk(job: Job) -> Commands:
    """Attaches the bucket to the cluster: every workload from then on has it mounted."""
    _needs(job, "bucket")
    how = (f"--mount-point={job.mount}", "--auto-mount=true", "--readonly=false", "--size=1")
    return [_xpk(job, "storage", "attach", f"{job.name}-bucket", "--type=gcsfuse", f"--bucket={job.bucket}", *how)]


def run_xpk(job: Job) -> Commands:
    """xpk restarts on 42 and on statuses from 127 by itself, so often as it is told to."""
    command = shlex.join([f"CACHE={job.mount}/compiled", "bash", "launch/pods/run.sh", *job.processes()])
    _needs(job, "image", "bucket")
    what = (f"--workload={job.name}", f"--tpu-type={job.machine.accelerator}", f"--num-slices={job.machine.slices}")
    how = (f"--docker-image={job.image}", "--max-restarts=1000", *(["--spot"] if job.spot else []))
    return [_xpk(job, "workload", "create", *what, *how, f"--command={command}")]


def delete_xpk(job: Job) -> Commands:
    return [_xpk(job, "workload", "delete", f"--workload={job.name}", "--force")]


def run_slurm(job: Job) -> Commands:
    return [["sbatch", str(written(job, "sbatch", sbatch(job)))]]


# ----------------------------------------------------------------------------------------------------------------------- files


def jobset(job: Job) -> str:
    """The JobSet of a job.

    Raises:
        UserError: --image or --bucket is missing, or the machine has no TPUs.
    """
    _needs(job, "image", "bucket")
    machine = job.machine
    label = machine.generation.label
    assert machine.slice is not None
    command = ["bash", "launch/pods/run.sh", *job.processes()]
    text = (PODS / "jobset.yaml").read_text()
    text = text.replace(
        "                $spot\n", '                cloud.google.com/gke-spot: "true"\n' if job.spot else ""
    )
    return string.Template(text).substitute(
        name=job.name,
        slices=machine.slices,
        hosts=machine.hosts,
        chips=machine.chips_per_host,
        accelerator=label,
        topology=machine.slice.arrangement,
        image=job.image,
        account=job.account,
        bucket=job.bucket,
        mount=job.mount,
        command="".join(f"\n{' ' * 20}- {json.dumps(word)}" for word in command),
    )


def sbatch(job: Job) -> str:
    """The batch script of a job on GPUs."""
    machine = job.machine
    if machine.slice is not None:
        raise UserError(f"--machine={machine.name} has TPUs: --where=slurm is for GPUs.")
    return string.Template((PODS / "slurm.sbatch").read_text()).substitute(
        name=job.name,
        nodes=machine.hosts,
        gpus=machine.chips_per_host,
        mount=job.mount,
        python=job.python,
        command=shlex.join(job.processes()),
    )


def written(job: Job, kind: str, text: str) -> Path:
    """Writes a rendered file below out/ and says where."""
    file = Path("out") / "pods" / f"{job.name}.{kind}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def _needs(job: Job, *names: str) -> None:
    for name in names:
        if not getattr(job, name):
            raise UserError(f"--{name} is missing: --where={job.where} needs it.")


# ----------------------------------------------------------------------------------------------------------------------- doing


def execute(commands: Commands, dry: bool) -> int:
    """Runs commands until one fails; each is printed. Returns the last status."""
    for command in commands:
        print(f"$ {shlex.join(command)}", flush=True)
        if not dry and (status := subprocess.run(command).returncode):
            return status
    return 0


def babysit(
    job: Job, dry: bool, wait: float, creates: int = 100, run: Callable[[Commands, bool], int] = execute
) -> int:
    """Create, setup, run; all over again unless the command ends with 0 or 2. Machines that were taken away are deleted first.

    gcloud may not pass a status on from several hosts: after `GIVE_UP` runs in a row that ended soon it gives up too, and after
    so many `creates` in a row that gave no machines.
    """
    if job.where not in ("tpu-vm", "queued"):
        raise UserError(f"--where={job.where} starts jobs again by itself: use run.")
    soon = 0
    while True:
        if status := machines(job, dry, wait, creates, run):
            return status
        status, began = run(plan("setup", job), dry), time.monotonic()
        status = status or run(plan("run", job), dry)
        soon = soon + 1 if time.monotonic() - began < _SOON_SECONDS else 0
        if dry or status in (0, 2) or soon == GIVE_UP:
            return status
        print(f"note: ended with {status}; {distributed.RESTART} says start again.", file=sys.stderr, flush=True)
        time.sleep(wait)


def machines(job: Job, dry: bool, wait: float, creates: int, run: Callable[[Commands, bool], int]) -> int:
    """Returns 0 when the machines are there, made anew where they are not, or the last status of so many `creates` that failed."""
    if not run([describe(job)], dry) and not dry:
        return 0
    for number in range(creates):
        if number:  # there may be no room for hours
            time.sleep(min(wait * 2 ** min(number - 1, 20), _LONGEST_WAIT))
        run(plan("delete", job), dry)  # what a machine that was taken away, or a request that failed, leaves behind
        status = run(plan("create", job), dry)
        if status:
            continue
        while run([describe(job)], dry):  # a queued one comes when there is room
            if not run([lost(job)], dry):
                status = 1
                break
            time.sleep(wait)
        if not status:
            return 0
    print(f"error: {creates} creates in a row gave no machines: see what they said.", file=sys.stderr, flush=True)
    return status


def describe(job: Job) -> list[str]:
    """A command that succeeds when the machine is there and ready."""
    command = _gcloud(job, "compute", "tpus", "tpu-vm", "describe", job.name, "--format=value(state)")
    return ["bash", "-c", f'[[ "$({shlex.join(command)})" == READY ]]']


def lost(job: Job) -> list[str]:
    """A command that succeeds when what was created will never be ready: the queued request has ended, or the machine was taken away."""
    if job.where == "queued":
        command = _gcloud(
            job, "compute", "tpus", "queued-resources", "describe", job.name, "--format=value(state.state)"
        )
        ended = "FAILED|SUSPENDING|SUSPENDED"
    else:
        command = _gcloud(job, "compute", "tpus", "tpu-vm", "describe", job.name, "--format=value(state)")
        ended = "PREEMPTED|TERMINATED|STOPPED"
    return ["bash", "-c", f'[[ "$({shlex.join(command)})" =~ ^({ended})$ ]]']


def main(argv: Sequence[str]) -> int:
    options = flags.FLAGS
    if len(argv) < 2 or argv[1] not in ACTIONS:
        raise UserError(f"the first argument is what to do: {', '.join(ACTIONS)}.")
    job = Job(
        where=options.where,
        name=options.name,
        machine=Machine.find(options.machine),
        command=tuple(argv[2:]),
        **{
            name: getattr(options, name)
            for name in ("zone", "project", "spot", "bucket", "mount", "image", "account", "cluster", "python")
        },
    )
    if argv[1] == "render":
        print({"gke": jobset, "slurm": sbatch}.get(options.where, _no_file)(job), end="")
        return 0
    if argv[1] == "babysit":
        return babysit(job, options.dry_run, options.wait, options.creates)
    return execute(plan(argv[1], job), options.dry_run)


def _no_file(job: Job) -> str:
    raise UserError(f"--where={job.where} takes no file: gke and slurm do.")


def define_flags() -> None:
    flags.DEFINE_enum("where", None, PLACES, "Kind of fleet.", required=True)
    flags.DEFINE_string("machine", None, "Of configs/hardware.py; v5e-64x2 is two slices.", required=True)
    flags.DEFINE_string("name", "rad", "Of the machines, or of the job.")
    flags.DEFINE_string("zone", "", "Of Google Cloud.")
    flags.DEFINE_string("project", "", "Of Google Cloud; without it gcloud's own.")
    flags.DEFINE_boolean("spot", False, "Cheap machines that may be taken away.")
    flags.DEFINE_string("bucket", "", "Of Cloud Storage, mounted on every machine.")
    flags.DEFINE_string("mount", "/mnt/rad", "Where all machines see the same files.")
    flags.DEFINE_string("image", "", "Container image, of launch/pods/Dockerfile.tpu; for gke and xpk.")
    flags.DEFINE_string("account", "default", "Kubernetes service account that may use the bucket.")
    flags.DEFINE_string("cluster", "", "Of xpk.")
    flags.DEFINE_string("python", ".venv/bin/python", "For slurm.")
    flags.DEFINE_float("wait", 30.0, "Seconds between two tries of babysit.", lower_bound=0)
    flags.DEFINE_integer("creates", 100, "In a row, without machines, after which babysit ends.", lower_bound=1)
    flags.DEFINE_boolean("dry_run", False, "Print every command, run none.")


if __name__ == "__main__":
    define_flags()
    errors.run(main, positional=True)
