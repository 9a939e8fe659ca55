"""The paper's run at its own size, but for the networks and the pixels: `make rehearse`."""
