"""The implementation "cute_dsl": FlashInfer's CuTe-DSL kernels on Blackwell."""
