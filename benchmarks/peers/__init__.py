"""The systems that the gateway is compared with, each as plain as its own documentation has it."""
