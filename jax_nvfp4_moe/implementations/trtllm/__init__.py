"""The implementation "trtllm": FlashInfer's TRTLLM-Gen kernel on Blackwell."""
