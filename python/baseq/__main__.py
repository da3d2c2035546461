from baseq import main

main()
