from mamba_export.main import main

main()
