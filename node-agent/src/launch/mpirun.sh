# Starts so many processes of a command by the mpirun of this host, whichever it is: $1 is how many, $2 is what bash runs in each.
# The agent reads this in, and a rank's environment comes from its own host: nothing of it is on a command line.
if ! command -v mpirun >/dev/null; then
    echo "batchai: there is no mpirun on the PATH of this node ($PATH); install Open MPI, MPICH or Intel MPI, or set PATH in the job's environment variables" >&2
    exit 127
fi
version=$(mpirun --version 2>&1 </dev/null)
hosts=$AZ_BATCHAI_MPI_HOST_FILE
case $version in
*"Open MPI"* | *OpenRTE* | *PRRTE*)
    given=(--hostfile "$hosts" -n "$1" --map-by slot --bind-to none --wdir /)
    if [ "$EUID" = 0 ]; then given+=(--allow-run-as-root); fi
    ;;
*Intel* | *HYDRA* | *Hydra* | *MPICH* | *MVAPICH*)
    # The others come back to this host by its address: its name may be known to nobody.
    given=(-machinefile "${hosts%/*}/.hostfile.hydra" -localhost "$MASTER_ADDR" -genvnone -wdir / -n "$1")
    ;;
*)
    echo "batchai: $(command -v mpirun) is none of Open MPI, MPICH and Intel MPI; it calls itself: ${version:0:500}" >&2
    exit 126
    ;;
esac
# Ranks have sockets for their standard input with some of them, and bash would take itself for one that somebody logged in by.
exec mpirun "${given[@]}" /bin/bash --norc -c "$2"
