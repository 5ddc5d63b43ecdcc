"""What the papers' experiments share: tables over seeds, plots, pages, and small tasks and models to train on."""
