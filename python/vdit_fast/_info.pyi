from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    build_type: str
    compiler: str
    torch_headers: str
    torch_target: str
    cpu_isas: list[str]
    cuda: str | None
    cuda_targets: list[str]

class Kernel(TypedDict):
    op: str
    device: str
    variant: str
    dtypes: list[str]
    compiled: bool
    targets: list[str]

class CudaDevice(TypedDict):
    name: str
    capability: tuple[int, int]
    multiprocessors: int

class DeviceProbe(TypedDict):
    cpu_isa: str
    cpu_threads: int
    cuda_status: str
    cuda_driver: int
    cuda_devices: list[CudaDevice]

def build_info() -> BuildInfo: ...
def kernel_catalogue() -> list[Kernel]: ...
def device_probe() -> DeviceProbe: ...
