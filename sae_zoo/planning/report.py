"""All jobs of a command together: what they take, whether they fit, and how that is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from sae_zoo.planning.job import DEAD_SHARE, Harvest, Job, Phase
from sae_zoo.planning.machine import Machine, Rates

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(n_bytes: float) -> str:
    """Bytes for people, in powers of 1,024."""
    unit = 0
    while abs(n_bytes) >= 1024 and unit < len(_UNITS) - 1:
        n_bytes, unit = n_bytes / 1024, unit + 1
    return f"{n_bytes:.3g} {_UNITS[unit]}" if n_bytes < 1000 else f"{n_bytes:.0f} {_UNITS[unit]}"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for length, unit in ((86400 * 365, "years"), (86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


@dataclass(frozen=True)
class Planned:
    """A job with the rates of its SAE and its language model on this machine.

    Attributes:
        beside: bytes of the SAEs that take turns with it in one process (``hydra/launcher=one_stream``).
    """

    job: Job
    rates: Rates
    beside: int = 0

    def phases(self, machine: Machine) -> list[Phase]:
        """Harvest, training, evaluation; the SAEs beside it are there in the latter two."""
        memory = "host_bytes" if machine.device_bytes is None else "device_bytes"
        return [phase if phase.name == "harvest" else replace(phase, **{memory: getattr(phase, memory) + self.beside})
                for phase in self.job.phases(machine, self.rates)]

    def needs_more(self, machine: Machine, name: str) -> bool:
        """Whether the phase of that name takes more memory than there is."""
        return any(shortages_of(phase, machine) for phase in self.phases(machine) if phase.name == name)


@dataclass(frozen=True)
class Shortage:
    """Attributes: the phase whose memory is short, or None for the disk; what is needed and there, for people."""

    phase: str | None
    text: str


def shortages_of(phase: Phase, machine: Machine) -> list[Shortage]:
    """The places where a phase needs more memory than there is."""
    places = [("memory", phase.host_bytes, machine.host_bytes)]
    if machine.device_bytes is not None:
        places.append(("device memory", phase.device_bytes, machine.device_bytes))
    return [Shortage(phase.name, f"{phase.name} needs {size(needed)} of {place}, there are {size(there)}")
            for place, needed, there in places if needed > there]


@dataclass(frozen=True)
class Plan:
    """Jobs that run one after another on one machine.

    Attributes:
        harvest_of: of each job what decides its caches, so that jobs with the same share them; None without any.
        here: of these, whose caches are on the disk already, or elsewhere, with lines about their rows.
        copy_bytes: disk that copies of caches which lie elsewhere will take.
    """

    machine: Machine
    jobs: Sequence[Planned]
    harvest_of: Sequence[str | None]
    here: Mapping[str, Sequence[str]]
    copy_bytes: int

    @property
    def harvests(self) -> dict[str, Harvest]:
        """Harvests of all jobs, each once, by what decides its caches."""
        return {key: harvest for planned, key in zip(self.jobs, self.harvest_of, strict=True)
                if key and (harvest := planned.job.harvest) is not None}

    @property
    def missing(self) -> list[Harvest]:
        """The harvests that are still to be done."""
        return [harvest for key, harvest in self.harvests.items() if key not in self.here]

    @property
    def disk_bytes(self) -> int:
        """Space that is needed: caches that are missing, with the shard that is twice there; copies of others; the
        SAEs; and of the job whose are largest the checkpoints, which go when a job is finished.
        """
        sae = sum(planned.job.sae.parameter_bytes for planned in self.jobs)
        largest = max(planned.job.run_bytes() - planned.job.sae.parameter_bytes for planned in self.jobs)
        caches = sum(harvest.bytes_on_disk(at_peak=True) for harvest in self.missing)
        return caches + self.copy_bytes + sae + largest

    def disk_bytes_of(self, n_train: int) -> int:
        """:attr:`disk_bytes`, were there no more than ``n_train`` tokens of train in any cache."""
        fewer = [harvest.of_at_most(n_train) for harvest in self.missing]
        return self.disk_bytes - sum(harvest.bytes_on_disk(at_peak=True) - of_fewer.bytes_on_disk(at_peak=True)
                                     for harvest, of_fewer in zip(self.missing, fewer, strict=True))

    def phases(self) -> dict[str, Phase]:
        """Phases by name: time and FLOPs summed over the jobs, each harvest counted once; the largest memory of any
        job.
        """
        total: dict[str, Phase] = {}
        done = set(self.here)
        for planned, key in zip(self.jobs, self.harvest_of, strict=True):
            for phase in planned.phases(self.machine):
                if phase.name == "harvest":
                    assert key is not None  # of a job that harvests
                    if key in done:
                        continue
                    done.add(key)
                before = total.get(phase.name, Phase(phase.name, 0, 0, 0, 0))
                total[phase.name] = Phase(
                    phase.name, before.seconds + phase.seconds, before.flops + phase.flops,
                    max(before.host_bytes, phase.host_bytes), max(before.device_bytes, phase.device_bytes))
        return total

    def shortages(self) -> list[Shortage]:
        """All that does not fit: the disk first."""
        found = []
        if self.disk_bytes > (free := self.machine.free_disk_bytes):
            found.append(Shortage(None, f"{size(self.disk_bytes)} of disk are needed, {size(free)} are free"))
        return found + [shortage for phase in self.phases().values() for shortage in shortages_of(phase, self.machine)]


def text(plan: Plan) -> str:
    """The plan for people."""
    machine, first = plan.machine, plan.jobs[0].job
    devices = f", {first.devices} devices, figures for each" if first.devices > 1 else ""
    lines = [f"{len(plan.jobs)} job{'s' * (len(plan.jobs) > 1)}: {', '.join(p.job.name for p in plan.jobs[:4])}"
             f"{', ...' if len(plan.jobs) > 4 else ''}", f"on {machine.device}{devices}", ""]
    for key, harvest in plan.harvests.items():
        n_tokens, widths = sum(harvest.n_tokens.values()), " + ".join(map(str, harvest.widths))
        lines.append(f"activations  {n_tokens:,} tokens x {widths} x {harvest.dtype} = {size(harvest.activation_bytes)}"
                     f"{', on the disk already' if key in plan.here else ''}")
        lines += [f"{'':13}{line}" for line in plan.here.get(key, ())]
    lines.append(f"disk         {size(plan.disk_bytes)} are needed, {size(machine.free_disk_bytes)} are free")
    lines.append(f"memory       {size(machine.host_bytes)}" + (
        "" if machine.device_bytes is None else f", {size(machine.device_bytes)} on the device"))
    lines += ["", f"{'phase':12}{'time':>12}{'TFLOP':>12}{'memory':>12}{'on device':>12}"]
    phases = plan.phases()
    for phase in phases.values():
        on_device = "-" if machine.device_bytes is None else size(phase.device_bytes)
        lines.append(f"{phase.name:12}{duration(phase.seconds):>12}{phase.flops / 1e12:12.4g}"
                     f"{size(phase.host_bytes):>12}{on_device:>12}")
    lines.append(f"{'all':12}{duration(sum(p.seconds for p in phases.values())):>12}"
                 f"{sum(p.flops for p in phases.values()) / 1e12:12.4g}")
    lines += ["", "Assumed: " + "; ".join((
        "L0 is at its target (as it falls there) from the first step on",
        f"{DEAD_SHARE:.0%} of the latents are dead where AuxK is on",
        "text has the tokens asked for, and its tokenising takes no time",
        "the language model's layers are all as fast as the first, at random weights",
        "the disk goes on as fast as for the first 64 MB")) + "."]
    return "\n".join(lines)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    phases = plan.phases()
    return {
        "machine": asdict(plan.machine),
        "activation_bytes": sum(harvest.activation_bytes for harvest in plan.harvests.values()),
        "disk_bytes": plan.disk_bytes, "seconds": sum(phase.seconds for phase in phases.values()),
        "phases": {name: asdict(phase) for name, phase in phases.items()},
        "jobs": [{"name": planned.job.name, "rates": asdict(planned.rates),
                  "phases": {phase.name: asdict(phase) for phase in planned.phases(plan.machine)}}
                 for planned in plan.jobs],
    }
