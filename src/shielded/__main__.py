from shielded.cli import main

main()
