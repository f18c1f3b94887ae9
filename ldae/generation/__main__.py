from ldae.generation.command import main

main()
