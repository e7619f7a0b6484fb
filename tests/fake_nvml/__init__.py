"""A `libnvidia-ml.so.1` whose GPUs a test makes and breaks, under the real pynvml."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml.c")
GIB = 1 << 30


def build(directory: Path, *flags: str) -> Path:
    """Compile the library into `directory`; the path of the file."""
    library = directory / "libnvidia-ml.so.1"
    command = ["cc", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", *flags]
    done = subprocess.run(
        [*command, f"-Wl,-soname,{library.name}", "-o", library, SOURCE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return library


def whole(
    number: int, name: str = "NVIDIA A100-SXM4-80GB", memory: int = 80 * GIB
) -> dict[str, str]:
    """The facts of a GPU that works and is idle, as the fake library reads them."""
    return {
        "uuid": f"GPU-{number:08d}-0000-0000-0000-000000000000",
        "name": name,
        "pci": f"00000000:{number + 1:02X}:00.0",
        "memory": f"{memory} {GIB // 2} 0",
        "utilization": "0",
        "power": "61500",
        "power_limit": "400000",
        "energy": "1000",
        "temperature": "31",
        "throttle": "1",
        "ecc": "0",
        "remapped": "0 0 0 0",
        "processes": "",
    }


@dataclass
class FakeNvml:
    """What the library says; every change is seen by its next call. Keys are those of `nvml.c`."""

    library: Path
    state: Path
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment to find the library and its state."""
        before = os.environ.get("LD_LIBRARY_PATH")
        path = f"{self.library.parent}:{before}" if before else str(self.library.parent)
        return {"LD_LIBRARY_PATH": path, "FAKE_NVML_STATE": str(self.state)}

    def gpus(self, *gpus: dict[str, str], driver: str = "580.65.06") -> None:
        """These GPUs and nothing else."""
        self.facts = {"driver": driver, "gpus": str(len(gpus))}
        for number, facts in enumerate(gpus):
            self.facts |= {f"{number}.{key}": value for key, value in facts.items()}
        self.write()

    def set(self, prefix: str, **facts: str) -> None:
        """Change facts: `set("0", power="90000")`."""
        for key, value in facts.items():
            self.facts[f"{prefix}.{key}"] = value
        self.write()

    def unset(self, *keys: str) -> None:
        """What these keys say is not supported from now on."""
        for key in keys:
            del self.facts[key]
        self.write()

    def slice(self, gpu: int, slot: int, instance: str, memory: int = 10 * GIB) -> str:
        """Put a GPU in MIG mode and add a slice; its UUID."""
        uuid = f"MIG-{gpu:04d}{slot:04d}-0000-0000-0000-000000000000"
        self.facts[f"{gpu}.mig"] = "1"
        self.facts.pop(f"{gpu}.utilization", None)
        self.set(
            f"{gpu}.mig.{slot}",
            uuid=uuid,
            name="NVIDIA A100-SXM4-80GB MIG 1g.10gb",
            instance=instance,
            memory=f"{memory} 0 0",
            processes="",
        )
        return uuid

    def raise_xid(self, gpu: int, xid: int, instance: str = "") -> None:
        """An XID error happens; `instance` is "GPU instance:compute instance" of a slice."""
        event = f"{gpu}:{xid}" + (f":{instance}" if instance else "")
        self.facts["xids"] = " ".join([*self.facts.get("xids", "").split(), event])
        self.write()

    def write(self) -> None:
        """Make the facts those that the library reads, all at once."""
        lines = "".join(f"{key}={value}\n" for key, value in self.facts.items())
        new = self.state.with_suffix(".new")
        new.write_text(lines)
        new.replace(self.state)
