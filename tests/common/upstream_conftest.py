"""conftest.py of the tree that run.sh builds: registers upstream's markers."""

MARKERS = [
    "is_pipeline_test", "is_staging_test", "accelerate_tests", "not_device_test", "torch_compile_test",
    "torch_export_test", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "flash_attn_mps_test", "generate",
    "bitsandbytes", "training_ci", "tensor_parallel_ci", "slow",
]  # fmt: skip


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: upstream's")
