from aae_batch.cli import main

main()
