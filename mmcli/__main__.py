"""`python -m mmcli` is `mm`."""

from mmcli.app import main

main()
