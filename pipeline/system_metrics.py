"""What a machine is doing: CPU, memory, disk, network, GPU; named as in MLflow, so that its pages group them."""

import os
import sys
from pathlib import Path
from typing import Any

import psutil

RANKS = "system/ranks"
GPU_MEMORY = "system/gpu_{}_memory_usage_megabytes"
MB = 1e6


class Machine:
    """Readings of this machine, and of the processes that train. Network traffic counts from when this is made.

    `folder` is on the disk that is looked at. A reading takes half a millisecond on a CPU machine.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self._process = psutil.Process()
        self._network = psutil.net_io_counters()
        psutil.cpu_percent()  # tells the mean since it was last asked

    def sample(self) -> dict[str, float]:
        """Readings by name, now; of the CPU, the mean since the sample before."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(self._folder)
        readings = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MB,
            "system_memory_usage_percentage": memory.percent,
            "process_memory_megabytes": self._process.memory_info().rss / MB,
            "disk_usage_megabytes": disk.used / MB,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / MB,
        }
        return {f"system/{name}": value for name, value in readings.items()} | self._traffic() | _gpu() | self._gang()

    def _traffic(self) -> dict[str, float]:
        now, then = psutil.net_io_counters(), self._network
        if now is None or then is None:  # no interface at all
            return {}
        return {
            "system/network_receive_megabytes": (now.bytes_recv - then.bytes_recv) / MB,
            "system/network_transmit_megabytes": (now.bytes_sent - then.bytes_sent) / MB,
        }

    def _gang(self) -> dict[str, float]:
        return {RANKS: self._ranks}


def _gpu() -> dict[str, float]:
    """Of the GPU that this process computes on; nothing where it computes on none."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    free, total = torch.cuda.mem_get_info(number)
    readings = {
        GPU_MEMORY.format(number): (total - free) / MB,
        f"system/gpu_{number}_memory_usage_percentage": 100 * (total - free) / total,
    }
    try:
        readings[f"system/gpu_{number}_utilization_percentage"] = torch.cuda.utilization(number)
        readings[f"system/gpu_{number}_power_usage_watts"] = torch.cuda.power_draw(number) / 1000
    except ModuleNotFoundError:  # these two need nvidia-ml-py
        pass
    return readings
