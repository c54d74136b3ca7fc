-- For wrk: each thread connects to another address of the host, and so has another source address.
local number = 0

function setup(thread)
    number = number + 1
    thread.addr = wrk.lookup("198.19.252." .. number, wrk.port)[1]
end
